"""`python -m benchmarks`: the main benchmark, or one of the other programs by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Program -> what it does; each is a module of benchmarks/programs/ with main(argv).
PROGRAMS = {
    "base": "what a shipped base can do before a stream is learnt on it",
    "compare": "two results side by side, case by case",
    "crossovers": "which products the native layer computes itself, by measurement",
    "e2e": "training step and generated tokens of whole models",
    "experiments": "how a layer's products are best put together on a GPU",
    "gpu": "everything that a CUDA machine can settle, within ten minutes and a short second call",
    "libraries": "see to the native libraries of this checkout",
    "loading": "time and memory of loading a bundle, by its experts",
    "methods": "the adapted layer of every method against CRAM's",
    "mutants": "break the sources in one place at a time, and count how often the tests notice",
    "penalty": "the orthogonality penalty of a whole model against the loops it replaces",
    "predictions": "what was predicted for an H200, and which predictions held in the results of a folder",
    "prepare": "make the kit that the GPU command brings along: libraries and compiled kernels",
    "profile": "each kernel of the layer a few times, for a profiler",
    "replays": "whether captured calls give the right values on new inputs",
    "sanitize": "every operation once on small shapes, for compute-sanitizer",
    "scaling": "how the cost grows with experts, ranks, tokens and width",
    "serve": "the server under load, against the bare model and PEFT",
    "speed": "the table of docs/speed.md from the results in a folder",
    "trainer": "a step of CramTrainer against the plain Trainer with a LoRA of PEFT",
    "tune": "try the tiles of each kernel on this GPU",
    "vllm": "the gated group in vLLM against a plain LoRA and the base, with the plugin and without",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in PROGRAMS:
        return importlib.import_module(f"benchmarks.programs.{argv[0]}").main(argv[1:])
    arguments = _parser().parse_args(argv)
    from benchmarks import machine, plots, report, suite

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = "toy" if arguments.toy else "quick" if arguments.quick else "full"
    kept = machine.results_folder() / machine.machine_name(device)
    out = Path(arguments.out) if arguments.out else kept
    committed = report.load(kept / "results.json")
    plan = suite.Plan(size, device, out, arguments.only, arguments.seconds, arguments.resume)
    results = suite.run(plan)
    print(f"table: {report.write(out, results, committed)}")
    for picture in plots.write(out, results):
        print(f"plot: {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    programs = "\n".join(f"  python -m benchmarks {name:13}{text}" for name, text in PROGRAMS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the expert layer against its baselines on the shapes of real models.",
        epilog=f"other programs:\n{programs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer samples")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: by machine)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--resume", action="store_true", help="go on from results of the same commit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
