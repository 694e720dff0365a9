"""A stand-in for the module `llama_cpp`, as text: its own calls recorded, its tokens predictable.

The likeliest next token is the sum of those in the cache modulo the vocabulary, so that forgetting the cache, or not
clearing it, shows in what is generated.
"""

LLAMA_CPP = """
import ctypes

VOCABULARY = 13
llama_token = ctypes.c_int32
calls = []


class Parameters:
    n_gpu_layers = 99
    n_ctx = n_batch = n_threads = n_threads_batch = 0


class Context:
    def __init__(self, settings):
        self.settings, self.cache, self.logits = settings, [], None


def llama_backend_init(): calls.append("backend")
def llama_model_default_params(): return Parameters()
def llama_context_default_params(): return Parameters()
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocab): return VOCABULARY
def llama_print_system_info(): return b"CPU : FAKE = 1 | "
def llama_get_memory(context): return context
def llama_memory_clear(context, data): context.cache.clear()
def llama_batch_get_one(array, n): return list(array)[:n]


def llama_model_load_from_file(path, parameters):
    calls.append(("load", path, parameters.n_gpu_layers))
    return None if b"broken" in path else "model"


def llama_init_from_model(model, settings):
    calls.append(("context", settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch))
    return None if settings.n_ctx > 100_000 else Context(settings)


def llama_decode(context, tokens):
    if 12 in tokens:
        import os
        os.abort()
    context.cache += tokens
    return 1 if len(context.cache) > context.settings.n_ctx else 0


def llama_get_logits_ith(context, index):
    assert index == -1
    context.logits = (ctypes.c_float * VOCABULARY)(*[0.0] * VOCABULARY)
    context.logits[sum(context.cache) % VOCABULARY] = 1.0
    return ctypes.cast(context.logits, ctypes.POINTER(ctypes.c_float))
"""
