"""Writes every measured figure of README and docs from `benchmarks/results/`, and draws the charts.

A block is what stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`. `BLOCKS` says what each name
writes. A figure that no result carries has no place in README or docs.

    python benchmarks/figures.py            write blocks and charts (make figures)
    python benchmarks/figures.py --check    say what differs, and fail; nothing is written
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import charts
import decisions
import defaults
import drift
import experiments
import fast_paths
import fast_paths_engine
import fleet
import float32_products
import lora_plus
import nf4
import panels
import plan_memory
import prefix_attention
import promises
import record
import resident
import rivals_decoder
import rivals_encoder
import serve_speed
import store_scale
import suggest
import systemone
import tasks
import train_while_answering
import two_trees

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "measured.md",
    ROOT / "docs" / "howto" / "fleet.md",
    ROOT / "docs" / "howto" / "quantized.md",
    ROOT / "docs" / "howto" / "suggest.md",
    ROOT / "docs" / "howto" / "untrained.md",
    ROOT / "docs" / "tasks.md",
    ROOT / "docs" / "reference" / "methods.md",
    ROOT / "docs" / "explanation" / "fast-paths.md",
)
CHARTS = ROOT / "docs" / "images" / "measured"
BLOCK = re.compile(r"(<!-- figures: ([a-z0-9-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
# Runs before 2026-11-27 noted less of the processor. These are the machines that they ran on.
EARLIER = {
    "AMD EPYC, AVX2": "AMD EPYC, Zen 3, AVX2",
    "AMD EPYC, AVX-512 BF16": "AMD EPYC, Zen 4, AVX-512 BF16",
    "Intel(R) Xeon(R) Processor": "Intel Xeon, AMX",
    "Intel(R) Xeon(R) Processor @ 2.80GHz": "Intel Xeon, AVX-512",
}
JOBS = {
    "short": "LoRA, short texts, MiniLM",
    "full": "LoRA, articles, MiniLM",
    "every-weight": "every weight, short texts, MiniLM",
    "decoder-lora": "LoRA, headlines, SmolLM2-135M",
    "decoder-prefix": "prefix, headlines, SmolLM2-135M",
}
FLOAT32, BFLOAT16 = "turret fp32", "turret"
HF_FLOAT32, HF_BFLOAT16 = "HF dynamic", "HF tuned bf16 weights"
FLOAT32_RIVALS = (HF_FLOAT32, "HF compiled")  # the faster of them counts
BFLOAT16_RIVALS = (HF_BFLOAT16, "HF bf16 weights compiled")
Run = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block or chart differs")
    options = parser.parse_args(arguments)
    differing = list(differences())
    if options.check:
        for path, _ in differing:
            print(f"{path.relative_to(ROOT)}: differs from benchmarks/results: run `make figures`", file=sys.stderr)
        return 1 if differing else 0
    for path, text in differing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def differences() -> Iterator[tuple[Path, str]]:
    """(file, what it should be) of every page and chart that differs."""
    wanted = [(page, filled(page.read_text(encoding="utf-8"))) for page in PAGES]
    wanted += [
        (CHARTS / f"{name}-{theme}.svg", charts.drawn(*chart(), theme))
        for name, chart in DRAWN.items()
        for theme in charts.COLOURS
    ]
    for path, text in wanted:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield path, text


def filled(page: str) -> str:
    """The page with every block written anew. Raises KeyError for a name that `BLOCKS` does not have."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", page)


# --- training -------------------------------------------------------------------------------------------------------


def speed_runs() -> list[Run]:
    """The newest run for speed of each job on each machine, machines with the newest runs first."""
    runs = [run for run in record.load("train_speed") if run["what"] == "speed" and not again(run)]
    newest = record.newest(runs, lambda run: run["settings"]["job"])
    last: dict[str, tuple[bool, str]] = {}  # of each machine; one that trained no adapter comes last
    for run in newest:
        last[machine(run)] = max(last.get(machine(run), (False, "")), (adapts(run), at(run)))
    order = sorted(last, key=lambda name: last[name], reverse=True)
    return sorted(newest, key=lambda run: (order.index(machine(run)), list(JOBS).index(run["settings"]["job"])))


def adapts(run: Run) -> bool:
    """Whether an adapter is trained, so that PEFT is what it is compared with."""
    return run["settings"]["job"] != "every-weight"


def pair(run: Run, rivals_: Sequence[str], ours: str) -> tuple[list[float], list[float]] | None:
    """Seconds of each round of the best of some rivals, by its total time, and of ours.

    None where none of them ran, or the two did not compute in one precision: Turret takes float32 by itself where the
    processor has no bfloat16.
    """
    sides = run["sides"]
    mine = sides.get(ours, {})
    theirs = [sides[name] for name in rivals_ if sides.get(name, {}).get("blocks")]
    theirs = [side for side in theirs if mine.get("blocks") and side["dtype"] == mine["dtype"]]
    if not theirs:
        return None
    rounds = min(([sum(block) for block in side["blocks"]] for side in theirs), key=sum)
    return rounds, [sum(block) for block in mine["blocks"]]


def faster(run: Run, rivals_: Sequence[str], ours: str) -> str:
    """The ratio of the rounds with its interval, and of the total times."""
    found = pair(run, rivals_, ours)
    if found is None:
        return ""
    return f"{record.shown(record.ratio(*found), 1)}; total {sum(found[0]) / sum(found[1]):.1f}x"


def step(run: Run, side: str) -> str:
    """Milliseconds of a step, the median."""
    blocks = run["sides"].get(side, {}).get("blocks")
    return "" if not blocks else f"{1000 * statistics.median(one for block in blocks for one in block):.0f}"


def memory(run: Run) -> str:
    """The share of the rival's memory, in bfloat16: of the whole process, and above the base."""
    sides = [run["sides"].get(name) for name in (HF_BFLOAT16, BFLOAT16)]
    if pair(run, [HF_BFLOAT16], BFLOAT16) is None:
        return ""
    whole = [side["peak"] for side in sides if side]
    above = [side["peak"] - side["resident"] for side in sides if side]
    return f"{whole[1] / whole[0]:.0%} for the process, {above[1] / above[0]:.0%} above its base"


def training_table() -> str:
    rows = [
        (
            machine(run),
            JOBS[run["settings"]["job"]],
            step(run, BFLOAT16) or step(run, FLOAT32),
            faster(run, BFLOAT16_RIVALS, BFLOAT16),
            faster(run, FLOAT32_RIVALS, FLOAT32),
            memory(run),
            when(run),
        )
        for run in speed_runs()
    ]
    header = [
        "processor", "job", "ms a step", "bfloat16 against bfloat16", "float32 against float32",
        "memory, share of the other side's, bfloat16", "measured",
    ]  # fmt: skip
    return record.table(header, rows)


def quality_table() -> str:
    """Paired differences of held-out quality, Turret minus HF Trainer + PEFT."""
    rows = []
    for job, name in JOBS.items():
        runs = [run for run in record.load("train_speed") if run["what"] == "quality" and run["settings"]["job"] == job]
        runs = [run for run in runs if run["settings"].get("start") in ("the same", "each its own")]
        if job != "decoder-prefix":
            runs = [run for run in runs if run["settings"]["start"] == "the same"]
        if job == "full":
            runs = [run for run in runs if run["settings"]["test"] == 400]
        if not runs:
            continue
        by_side: dict[str, dict[int, float]] = {}
        for run in runs:
            by_side.setdefault(run["who"], {})[run["seed"]] = run["metric"]
        points = job in ("short", "full")
        rows.append([
            name, "accuracy, points" if points else "loss per target token",
            paired(by_side, BFLOAT16, HF_FLOAT32, points),
        ])  # fmt: skip
    header = ["job", "score", "bfloat16 minus HF + PEFT in float32"]
    return record.table(header, rows)


def paired(by_side: Mapping[str, Mapping[int, float]], one: str, other: str, points: bool) -> str:
    """The mean difference over common seeds with its 95% interval (Student's t)."""
    common = sorted(set(by_side.get(one, {})) & set(by_side.get(other, {})))
    if len(common) < 2:
        return ""
    factor, digits = (100, 1) if points else (1, 3)
    found = record.student([factor * (by_side[one][seed] - by_side[other][seed]) for seed in common])
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}], {len(common)} seeds"


# --- serving --------------------------------------------------------------------------------------------------------


def serving_runs() -> list[Run]:
    """The newest full run of each kind and precision on each machine."""
    runs = [run for run in record.load("serve_speed") if not run["settings"]["quick"] and not again(run)]
    newest = record.newest(runs, lambda run: (run["settings"]["kind"], run["settings"]["dtype"]))
    return sorted(newest, key=lambda run: (machine(run), *run["settings"].values()), reverse=True)


def serving_table() -> str:
    different = "engine all different"
    rows = []
    for run in serving_runs():
        settings = run["settings"]
        own, beside = run["seconds"], run["seconds_with_peft"]
        adapters = 32 if settings["kind"] == "encoder" else 16
        rival = "peft bucketed" if "peft bucketed" in beside else "peft padded"
        rows.append([
            machine(run), f"{settings['kind']}, {settings['dtype']}, {adapters} adapters in the batch",
            spread(own, "engine bare", different, 2), spread(beside, rival, different, 1, "x"),
            loaded(run), when(run),
        ])  # fmt: skip
    header = [
        "processor", "batch", "speed, the bare base is 1", "faster than PEFT `adapter_names`, same precision",
        "first answer of a new adapter, faster than PEFT", "measured",
    ]  # fmt: skip
    return record.table(header, rows)


def spread(times: Mapping[str, Sequence[float]], slow: str, quick: str, digits: int, unit: str = "") -> str:
    return record.shown(record.ratio(times[slow], times[quick]), digits, unit)


def loaded(run: Run) -> str:
    """The most adapters beside which PEFT loaded one too, and how many times sooner Turret's answer was there."""
    both = [at_ for at_ in run["loading"] if "peft load" in at_["seconds"]]
    if not both:
        return ""
    last = both[-1]
    took = {name: statistics.median(each) for name, each in last["seconds"].items()}
    ours = took.get("turret load and answer", took["turret load"] + took["turret answer"])
    return f"{(took['peft load'] + took['peft answer']) / ours:.0f}x, {last['present']} others loaded"


def missed() -> str:
    """Every goal that the newest runs of serving, alone and beside other engines, did not reach."""
    rows = [
        [machine(run), f"{run['settings']['kind']}, {run['settings']['dtype']}", name, must, got]
        for run in serving_runs()
        for name, must, got, verdict in serve_speed.goals(run)
        if verdict == "missed"
    ]
    rows += [
        [machine(run), f"encoder, {run['settings']['dtype']}", name, must, got]
        for run in rivals_encoder.kept()
        for name, must, got, verdict in rivals_encoder.goals(run)
        if verdict == "missed"
    ]
    return record.table(["processor", "batch", "goal", "wanted", "measured"], rows) if rows else "None."


def rival_encoders() -> str:
    return rivals_encoder.report(rivals_encoder.kept(), machine) or "Not run yet on any machine."


def rival_decoders() -> str:
    return rivals_decoder.report(rivals_decoder.kept(), machine) or "Not run yet on any machine."


# --- the front page -------------------------------------------------------------------------------------------------


def summary() -> str:
    """The README's lines: the newest machine, one precision on both sides, and only ratios beyond chance."""
    runs = speed_runs()
    newest = machine(runs[0])
    lines = []
    for run in runs:
        said = [
            f"{record.shown(found, 1)} faster in {precision}"
            for precision, found in (
                ("bfloat16", claimed(pair(run, BFLOAT16_RIVALS, BFLOAT16))),
                ("float32", claimed(pair(run, FLOAT32_RIVALS, FLOAT32))),
            )
            if found is not None
        ]
        if machine(run) == newest and said and adapts(run):
            lines.append(
                f"- **{JOBS[run['settings']['job']]}**: a training step is {' and '.join(said)} than HF Trainer + "
                f"PEFT at its best. Memory against it: {memory(run)}."
            )
    named = {"encoder": "32 LoRAs in one batch of MiniLM", "decoder": "16 LoRAs decoding on SmolLM2-135M"}
    for run in serving_runs():
        if run["settings"]["dtype"] == "bfloat16":
            beside, different = run["seconds_with_peft"], "engine all different"
            rival = "peft bucketed" if "peft bucketed" in beside else "peft padded"
            if claimed((beside[rival], beside[different])) is not None:
                lines.append(
                    f"- **{named[run['settings']['kind']]}** ({machine(run)}): "
                    f"{spread(beside, rival, different, 1, 'x')} faster than PEFT's `adapter_names`, both in bfloat16."
                )
    lines += [line for run in rivals_decoder.kept() for line in beside_vllm(run)]
    return f"On two cores of an {newest}, with 95% intervals:\n\n" + "\n".join(lines)


def claimed(found: tuple[Sequence[float], Sequence[float]] | None) -> record.Interval | None:
    """The ratio, if its interval lies above 1."""
    if found is None:
        return None
    ratio = record.ratio(*found)
    return ratio if ratio.low > 1 else None


def beside_vllm(run: Run) -> Iterator[str]:
    """The line of the tuned vLLM with LoRAs."""
    who, way = rivals_decoder.LORA, rivals_decoder.DIFFERENT
    if who in run["sides"]:
        theirs, ours = run["sides"][who], run["sides"][rivals_decoder.TURRET]
        if found := claimed((theirs["ways"][way], ours["ways"][way])):
            yield (
                f"- **{run['settings']['prompts']} LoRAs decoding on SmolLM2-135M** ({machine(run)}): "
                f"{record.shown(found, 1)} faster than vLLM {theirs['version']} on the CPU, both in "
                f"{run['settings']['dtype']}."
            )


def training_chart() -> tuple[str, str, list[charts.Bar]]:
    runs = speed_runs()
    newest = machine(runs[0])
    bars = []
    for run in (each for each in runs if machine(each) == newest and adapts(each)):
        for precision, theirs, ours in (("bfloat16", BFLOAT16_RIVALS, BFLOAT16), ("float32", FLOAT32_RIVALS, FLOAT32)):
            if found := claimed(pair(run, theirs, ours)):
                label = f"{JOBS[run['settings']['job']]}, {precision}"
                bars.append(charts.Bar(label, found.mean, found.low, found.high))
    return (
        "A training step against HF Trainer + PEFT at its best, same precision",
        f"{newest}, two cores. Dashed: HF Trainer + PEFT. Thin lines: 95% intervals.",
        bars,
    )


# --- words ----------------------------------------------------------------------------------------------------------


def again(run: Run) -> bool:
    """Whether a run on Zen 4 was repeated there since its instructions are noted."""
    return str(run["machine"]["device"]) == "AMD EPYC"


def machine(run: Run) -> str:
    """The processor, by family and model where the run noted them."""
    device = str(run["machine"]["device"])
    return EARLIER.get(device, re.sub(r", family \d+ model \d+", "", device))


def at(run: Run) -> str:
    return str(run["machine"]["at"])


def when(run: Run) -> str:
    """The date. The result has the commit; a history that was rewritten may lack it."""
    return at(run)[:10]


BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "training": training_table,
    "quality": quality_table,
    "serving": serving_table,
    "missed": missed,
    "rivals-encoder": rival_encoders,
    "rivals-decoder": rival_decoders,
    "float32": lambda: float32_products.report(record.newest(record.load("float32_products"), lambda _: 0)),
    "fast-paths": lambda: fast_paths.figures(machine),
    "fast-paths-engine": lambda: fast_paths_engine.figures(machine),
    "plan-memory": lambda: plan_memory.report(record.load("plan_memory")),
    "resident": lambda: resident.report(record.load("resident")),
    "train-while-answering": lambda: train_while_answering.report(record.load("train_while_answering")),
    "two-trees": lambda: two_trees.latest(record.load("two_trees")),
    "lora-plus": lambda: lora_plus.report(record.load("lora_plus")),
    "nf4": lambda: nf4.report(record.load("nf4")),
    "store": store_scale.report,
    "fleet": fleet.simulated,
    "fleet-validated": fleet.validated,
    "fleet-jobs": fleet.jobs_table,
    "decisions": lambda: decisions.report(record.load("decisions")),
    "panels": lambda: panels.report(record.load("panels")),
    "systemone": lambda: systemone.report(record.newest(record.load("systemone"), lambda run: repr(run["settings"]))),
    "suggest": lambda: suggest.report(record.load("suggest")),
    "tasks": lambda: tasks.report(record.load("tasks")),
    "promises-chosen": lambda: promises.chosen_report(record.load("promises")),
    "drift-alike": lambda: drift.alike_report(record.load("drift")),
    "drift-noticed": lambda: drift.noticed_report(record.load("drift")),
    "promises-watched": lambda: promises.watched_report(record.load("promises")),
    "experiments": experiments.verdicts,
    "discoveries": experiments.named,
    "outages": experiments.guarded,
    "missing-outcomes": experiments.missed,
    "advice": experiments.advised,
    "other-mix": experiments.mixed,
    "defaults": lambda: defaults.confirmed(record.load("defaults")),
    "defaults-outside": lambda: defaults.elsewhere(record.load("defaults")),
    "defaults-missed": lambda: defaults.missed(record.load("defaults")),
    "defaults-macro-f1": lambda: defaults.macro_f1(record.load("defaults")),
    "defaults-screening": lambda: defaults.screened(record.load("defaults")),
    "prefix-attention": lambda: prefix_attention.report(record.load("prefix_attention")),
}
DRAWN: dict[str, Callable[[], tuple[str, str, list[charts.Bar]]]] = {"training": training_chart}


if __name__ == "__main__":
    sys.exit(main())
