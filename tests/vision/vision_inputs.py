"""Model inputs with noise for images."""

from __future__ import annotations

import torch

PATCH_VALUES = 3 * 2 * 8 * 8  # channels × temporal patch × patch side²


def image_inputs(rows: list[list[tuple[int, int] | int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs, padded left. A row is a list of text lengths and of image grids (height, width in patches).

    Returns `input_ids`, `attention_mask`, `mm_token_type_ids` [B, L] and, with images, `pixel_values`
    [patches, 384] and `image_grid_thw` [images, 3].
    """
    generator = torch.Generator().manual_seed(seed)
    sequences, grids = [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(8, 1792, (part,), generator=generator).tolist()
            else:
                grids.append((1, *part))
                ids += [3, *[5] * (part[0] * part[1] // 4), 4]
        sequences.append(ids)
    inputs = padded(sequences)
    if grids:
        patches = sum(height * width for _, height, width in grids)
        inputs["pixel_values"] = torch.randn(patches, PATCH_VALUES, generator=generator)
        inputs["image_grid_thw"] = torch.tensor(grids)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).int()
    return inputs


def padded(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    return {"input_ids": ids, "attention_mask": mask}
