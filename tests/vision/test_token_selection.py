import pytest
import torch

from optimizations.vision.token_selection import METHODS, farthest, uniform, volume


def random_features(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (7, 1), (7, 3), (7, 7), (64, 31)])
def test_indices_are_ascending_and_distinct(method: str, tokens: int, count: int) -> None:
    chosen = METHODS[method](random_features(tokens), count)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == count and 0 <= int(chosen.min()) and int(chosen.max()) < tokens


@pytest.mark.parametrize("method", [volume, farthest])
def test_duplicates_go_first(method: object) -> None:
    distinct = random_features(6)
    features = distinct[[0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5, 5]]
    kept = features[method(features, 6)]  # type: ignore[operator]
    assert torch.unique(kept, dim=0).shape[0] == 6


@pytest.mark.parametrize("method", METHODS)
def test_more_than_the_distinct_tokens_still_gives_the_count(method: str) -> None:
    features = random_features(2)[[0, 1] * 5]
    assert len(set(METHODS[method](features, 9).tolist())) == 9


@pytest.mark.parametrize("method", METHODS)
def test_identical_and_zero_features_are_no_special_case(method: str) -> None:
    assert len(set(METHODS[method](torch.zeros(8, 4), 5).tolist())) == 5


def test_volume_is_the_greedy_determinant() -> None:
    features = random_features(9, seed=3).double()
    chosen: list[int] = []
    for _ in range(4):
        rest = [token for token in range(9) if token not in chosen]
        grams = {token: features[[*chosen, token]] for token in rest}
        chosen.append(max(rest, key=lambda token: float(torch.linalg.det(grams[token] @ grams[token].T))))
    assert volume(features, 4).tolist() == sorted(chosen)


def test_uniform_covers_the_whole_image() -> None:
    assert uniform(random_features(64), 4).tolist() == [8, 24, 40, 56]


def test_methods_read_bfloat16() -> None:
    features = random_features(16).bfloat16()
    for method in METHODS.values():
        assert len(method(features, 5)) == 5
