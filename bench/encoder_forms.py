"""The encoder's weights in every form: seconds and memory by tokens, C4; and C2, against llama.cpp.

    python -m bench.encoder_forms [--write NAME]

Seven layers of Qwen3-4B's shape with random weights run, and count five times: the encoder runs 35.
All forms are loaded from one file by the service's own loader, and take their turns in each round;
what a form holds and takes at its peak is measured in a process of its own. llama.cpp runs seven
layers of the same weights in Q8_0, and its final norm, without a head.

With ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 a CPU with AMX computes as one without does; llama.cpp
heeds no such wish, and is built without: its own code for AMX crashed on the machine at hand.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import Qwen3Config, Qwen3Model

from bench.encoder import QWEN3_4B
from bench.timing import compare, machine, write_results
from encoder_service.model.loading import load
from encoder_service.model.narrow import FULL, INT4, INT8, INT8_DYNAMIC
from encoder_service.model.qwen import Qwen3Encoder, Text
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving import memory

LAYERS, FEW_LAYERS, TIMES = 7, 3, 5
TOKENS = (8, 32, 128, 512, 1504)
FORMS = {
    "float32": ("float32", FULL),
    "bfloat16": ("bfloat16", FULL),
    "int8": ("bfloat16", INT8),
    "int8_dynamic": ("bfloat16", INT8_DYNAMIC),
    "int4": ("bfloat16", INT4),
}
MEMORY_TARGET, COSINE_TARGETS = 0.60, {"int8": 0.999, "int8_dynamic": 0.995}
LLAMA_TARGETS = {32: 1.5, 128: 2.0}
_SIZES = QWEN3_4B | {"num_hidden_layers": LAYERS + 1}


def write_folder(folder: Path) -> None:
    """Weights as a checkpoint of Qwen3 alone, each drawn for itself."""
    config = Qwen3Config(**_SIZES)
    with torch.device("meta"):
        model: Any = Qwen3Model(config)
    draw = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        if like.dim() == 1:
            return torch.ones(like.shape, dtype=torch.bfloat16)
        values = torch.empty(like.shape, dtype=torch.bfloat16)
        return nn.init.normal_(values, std=like.shape[1] ** -0.5, generator=draw)

    save_file({k: drawn(v) for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**_SIZES, "model_type": "qwen3"}))


def files_in(folder: Path) -> EncoderFiles:
    return EncoderFiles(folder, folder / "tokenizer.json")


def loaded(folder: Path, form: str, layers: int = LAYERS) -> Qwen3Encoder:
    dtype, weights = FORMS[form]
    return load(files_in(folder), layers - LAYERS - 2, "cpu", dtype, weights)


def tokens(count: int) -> list[int]:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, QWEN3_4B["vocab_size"], (count,), generator=draw).tolist()


def run(encoder: Qwen3Encoder, count: int) -> Callable[[], Tensor]:
    text = Text(tokens(count), ((encoder.deepest, 1.0),))
    return lambda: encoder([text])[0].state


def held(folder: str, form: str, layers: int, results: Any) -> None:
    """In a process of its own: bytes and seconds of so many layers, and what runs take besides."""
    before = memory.used_and_peak()[0]
    began = time.perf_counter()
    encoder = loaded(Path(folder), form, layers)
    seconds = time.perf_counter() - began
    run(encoder, 8)()  # touches every weight that lies in a mapped file
    own = memory.used_and_peak()[0] - before
    peaks = {}
    for count in TOKENS:
        used, _ = memory.used_and_peak()
        run(encoder, count)()
        peaks[count] = memory.used_and_peak()[1] - used
    results.put({"bytes": own, "seconds": seconds, "peaks": peaks})


def apart(folder: Path, form: str, layers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=held, args=(str(folder), form, layers, results))
    process.start()
    found: dict[str, Any] = results.get(timeout=600)
    process.join()
    return found


def measured_memory(folder: Path, form: str) -> dict[str, Any]:
    """Of 35 layers, by what 4 more layers take; and of the token table, all of it."""
    few, many = apart(folder, form, FEW_LAYERS), apart(folder, form, LAYERS)

    def of_all(what: str) -> float:
        each: float = (many[what] - few[what]) / (LAYERS - FEW_LAYERS)
        return float(many[what]) + each * LAYERS * (TIMES - 1)

    table = QWEN3_4B["vocab_size"] * QWEN3_4B["hidden_size"] * 2
    # In float32 it was made and is there; else it is mapped, and eight tokens touched some of it.
    whole = of_all("bytes") + (0 if form == "float32" else table)
    return {
        "weights_gb": round(whole / 1e9, 2),
        "load_seconds": round(of_all("seconds"), 1),
        "peak_gb": {count: round((whole + peak) / 1e9, 2) for count, peak in many["peaks"].items()},
    }


@contextmanager
def llama(folder: Path) -> Iterator[Callable[[int], Callable[[], object]]]:
    """Runs of as many tokens, each from nothing, in llama.cpp's own process."""
    path = folder / "q8_0.gguf"
    write_q8_0(folder, path)
    command = [sys.executable, "-m", "bench.llama_peer"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer_to(line: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            if not (answer := process.stdout.readline()):
                raise RuntimeError("llama.cpp died")
            return answer

        answer_to(f"{path} {torch.get_num_threads()}")

        def run_of(count: int) -> Callable[[], object]:
            line = " ".join(map(str, tokens(count)))
            return lambda: answer_to(line)

        yield run_of
        process.stdin.close()


def write_q8_0(folder: Path, path: Path) -> None:
    """As its own converter writes it; of the layers, those that ours runs."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(QWEN3_4B["max_position_embeddings"])
    writer.add_embedding_length(QWEN3_4B["hidden_size"])
    writer.add_feed_forward_length(QWEN3_4B["intermediate_size"])
    writer.add_head_count(QWEN3_4B["num_attention_heads"])
    writer.add_head_count_kv(QWEN3_4B["num_key_value_heads"])
    writer.add_key_length(QWEN3_4B["head_dim"])
    writer.add_value_length(QWEN3_4B["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(QWEN3_4B["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in load(files_in(folder), -2, "cpu", "float32").state_dict().items():
        known = names.get_name(f"model.{name}", try_suffixes=(".weight",)) or ""
        if weight.dim() == 1:
            writer.add_tensor(known, weight.numpy())
        else:
            writer.add_tensor(known, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    last = torch.ones(QWEN3_4B["hidden_size"])
    writer.add_tensor("output_norm.weight", last.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {form: measured_memory(folder, form) for form in FORMS}
    print({form: found[form]["weights_gb"] for form in FORMS}, flush=True)
    encoders = {form: loaded(folder, form) for form in FORMS}
    exact = run(encoders["float32"], 128)()
    for form, encoder in encoders.items():
        cosines = cosine_similarity(run(encoder, 128)().float(), exact)[1:]
        found[form]["worst_cosine"] = round(float(cosines.min()), 6)
        found[form]["seconds"] = {}
    for count in TOKENS:
        timings = compare(rounds, **{name: run(one, count) for name, one in encoders.items()})
        for form in FORMS:
            found[form]["seconds"][count] = round(TIMES * timings.median(form), 3)
            ratio = timings.ratio("bfloat16", form)
            found[form].setdefault("over_bfloat16", {})[count] = round(ratio, 2)
        print({form: found[form]["seconds"][count] for form in FORMS}, flush=True)
    for form, least in COSINE_TARGETS.items():
        share = found[form]["weights_gb"] / found["bfloat16"]["weights_gb"]
        found[form] |= {"of_bfloat16s_memory": round(share, 3), "least_cosine": least}
    return {"forms": found, **_beside_llama(folder, encoders, rounds)}


def _beside_llama(folder: Path, encoders: dict[str, Qwen3Encoder], rounds: int) -> dict[str, Any]:
    if importlib.util.find_spec("llama_cpp") is None:
        print("SKIPPED: C2: llama.cpp is not here; with a C++ compiler and some minutes")
        print(f"{sys.executable} -m pip install -c constraints.txt llama-cpp-python   builds it")
        return {}
    ours = {name: encoders[name] for name in ("bfloat16", "int8", "int8_dynamic")}
    found = {}
    with llama(folder) as run_of:
        for count, target in LLAMA_TARGETS.items():
            runs: dict[str, Callable[[], object]] = {
                name: run(one, count) for name, one in ours.items()
            }
            timings = compare(rounds, llama=run_of(count), **runs)
            found[count] = {
                "target": target,
                "llama_seconds": round(TIMES * timings.median("llama"), 3),
                **{name: round(timings.ratio("llama", name), 2) for name in ours},
            }
    return {"C2: Q8_0 of llama.cpp over ours": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="NAME", help="keep the figures under that name")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch))
        with torch.inference_mode():
            result = measure(Path(scratch), arguments.rounds)
    result["threads"] = torch.get_num_threads()
    result["onednn_isa"] = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    peers = ("llama_cpp_python",) if importlib.util.find_spec("llama_cpp") else ()
    result["machine"] = machine("torch", "transformers", *peers)
    print(json.dumps(result, indent=1))
    if arguments.write:
        print(write_results(arguments.write, result))


if __name__ == "__main__":
    main()
