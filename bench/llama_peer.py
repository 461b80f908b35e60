"""llama.cpp as a process of its own, for whoever measures it: its threads and torch's do not mix.

Reads lines from standard input: first the path of a GGUF file and a number of threads, then token
ids; answers each line when it is done, with a number of the last token's embedding.
"""

import ctypes
import sys

import llama_cpp as cpp  # type: ignore[import-not-found]

_MOST_TOKENS = 512


@cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(_level: int, _text: bytes, _data: object) -> None:
    """Its notes would stand among the answers."""


def main() -> None:
    path, threads = sys.stdin.readline().split()
    cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    wishes = cpp.llama_context_default_params()
    wishes.n_ctx = wishes.n_batch = wishes.n_ubatch = _MOST_TOKENS
    wishes.n_threads = wishes.n_threads_batch = int(threads)
    wishes.embeddings, wishes.pooling_type = True, cpp.LLAMA_POOLING_TYPE_NONE
    context = cpp.llama_init_from_model(model, wishes)
    print("ready", flush=True)
    batch = cpp.llama_batch_init(_MOST_TOKENS, 0, 1)
    for line in sys.stdin:
        tokens = line.split()
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = int(token), at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        if cpp.llama_decode(context, batch):
            sys.exit("llama.cpp failed")
        print(cpp.llama_get_embeddings_ith(context, len(tokens) - 1)[0], flush=True)


if __name__ == "__main__":
    main()
