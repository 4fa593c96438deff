"""Draws the pictures of docs/findings.md from the studies that are kept.

python docs/findings.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import fisher_exact

from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.drawing import frames
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.report.loss_pictures import losses_on
from gqa_scaling.study.report.pictures import rendered
from gqa_scaling.study.results import Results, pair
from gqa_scaling.study.source import read_source

HERE = Path(__file__).parent
LINUX = str(HERE.parent / "studies" / "linux.csv")


@draw.styled
def laws() -> Figure:
    """The paper's runs and ours, with the law fitted to each."""
    figure, axes = frames(11, 4.1, 2)
    for axis, (name, source) in zip(
        axes,
        (("Chen et al. 2025, figure 2", "chen2025"), ("experiments.linux", LINUX)),
        strict=True,
    ):
        fit = estimate(read_source(source, (), None).results).fit
        losses_on(axis, fit)
        axis.set_title(name)
        axis.legend(title="heads, KV", fontsize=8, ncols=2)
    return figure


@draw.styled
def context_gains(results: Results) -> Figure:
    """What the context of 256 tokens gains each run, over what it was trained on."""
    figure, axes = frames(11, 4.1, 2)
    for heads, look in looks(results.heads).items():
        look |= {"linestyle": "none"}
        mine = [i for i, h in enumerate(results.heads) if h == heads]
        parts = np.array([results.positions[str(results.name[i])] for i in mine])
        tokens = results.tokens[mine]
        axes[0].plot(tokens, parts[:, 0], **look, label=pair(heads))
        axes[1].plot(tokens, parts[:, 0] - parts[:, -1], **look)
    part = int(results.context_length[0]) // parts.shape[1]
    axes[0].set(
        ylabel="loss (nats per token)", title=f"Loss at the first {part} positions of a sequence"
    )
    axes[1].set(ylabel="nats per token", title=f"That minus the loss at the last {part}")
    for axis in axes:
        axis.set(
            xlabel="training tokens", xlim=(results.tokens.min() / 1.2, results.tokens.max() * 1.2)
        )
        draw.decades_axis(axis)
    figure.legend(title="heads, KV", loc="outside right upper")
    return figure


def copying(results: Results) -> str:
    """How many runs copy from their context: at each width from 64 on, those above the widest gap in
    what context gains. Fisher's exact test, one-sided: more where each query head has a KV head."""
    parts = [results.positions[str(name)] for name in results.name]
    gain = np.array([losses[0] - losses[-1] for losses in parts])
    heads_alike = results.n_heads == results.n_kv_heads
    table = np.zeros((2, 2), int)  # query heads with a KV head each or not; copying or not
    for width in (64, 88):
        mine = results.d_model == width
        ordered = np.sort(gain[mine])
        gap = np.argmax(np.diff(ordered))
        for alike, copies in zip(heads_alike[mine], gain[mine] > ordered[gap], strict=True):
            table[int(not alike), int(not copies)] += 1
    p = fisher_exact(table, alternative="greater").pvalue
    (yes, no), (others, not_others) = table
    return f"{yes} of {yes + no} copy, of the others {others} of {others + not_others}; p = {p:.2f}"


def main() -> None:
    linux = read_source(LINUX, (), None).results
    print(f"widths 64 and 88: with as many KV heads as query heads {copying(linux)}")
    for name, figure in {"laws": laws(), "context": context_gains(linux)}.items():
        (HERE / f"findings_{name}.png").write_bytes(rendered(figure, "png"))


if __name__ == "__main__":
    main()
