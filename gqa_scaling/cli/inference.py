"""The verbs of a trained model at work."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gqa_scaling.cli.shared import Verb, add_json, finite, print_json
from gqa_scaling.config import require
from gqa_scaling.fields import INT32_MAX

if TYPE_CHECKING:
    from gqa_scaling.data.tokenizer import Tokenizer
    from gqa_scaling.inference.generate import Generation


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="directory of a finished run, or EXPERIMENT:NAME of one of its runs")
    add("--prompt", action="append", required=True, help="text to go on from; may be repeated")
    add("--tokens", type=int, default=256, help="how many to write after each (default: 256)")
    add("--temperature", type=finite, default=1.0, help="0 takes the likeliest token (default: 1)")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=finite, help="draw from the fewest that hold this probability")
    add("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    add("--cache", choices=("float32", "bfloat16", "int8"), help="what keys and values are kept in")
    add("--context", type=int, help="most tokens with the prompt (default: as it was trained)")
    add(
        "--cache-error",
        action="store_true",
        help="also measure what the type of the cache changes, on the texts written",
    )
    add_json(parser)


def _generate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import named_run
    from gqa_scaling.inference.sampling import Sampling

    for name, value in (("--tokens", args.tokens), ("--context", args.context)):
        require(
            value is None or 0 < value <= INT32_MAX,
            f"{name} {value} must be greater than 0 and at most {INT32_MAX:,}",
        )
    require(0 <= args.seed < 2**31, f"--seed {args.seed} must lie between 0 and 2^31 - 1")
    for prompt in args.prompt:
        require(bool(prompt), "--prompt '' is empty: give it some text to go on from")
        require(
            not any("\ud800" <= c <= "\udfff" for c in prompt), f"--prompt {prompt!r} is no UTF-8"
        )
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    directory = named_run(args.source, rest, args.root)

    from gqa_scaling.devices.compilation_cache import keep_compiled
    from gqa_scaling.devices.processes import require_platform
    from gqa_scaling.files.storage import cache_folder
    from gqa_scaling.inference.generate import Generation
    from gqa_scaling.inference.trained import open_trained

    require_platform()
    keep_compiled(cache_folder() / "compiled")
    trained = open_trained(directory)
    tokenizer, decoder = trained.tokenizer(), trained.decoder()
    prompts = trained.tokens_of(args.prompt)
    context = args.context or trained.run.context_length
    for number, tokens in enumerate(prompts, 1):
        require(
            len(tokens) < context,
            f"prompt {number} has {len(tokens):,} tokens and the context is {context:,}: shorten it, "
            f"or give --context {len(tokens) + args.tokens}; the model was trained on "
            f"{trained.run.context_length:,} and is worse beyond",
        )
    generation = Generation(
        decoder,
        prompts,
        tokens=args.tokens,
        context=context,
        sampling=sampling,
        seeds=args.seed,
        stop=trained.stops,
        cache=args.cache,
        warm=True,
    )
    if said := generation.copies:
        print(said, file=sys.stderr)
    texts = _write(args.prompt, generation, tokenizer, shown=not args.json)
    error = _cache_error(args, generation) if args.cache_error else None
    if args.json:
        print_json(_as_json(args, generation, texts, error))
    else:
        for line in _summary(generation, context, error):
            print(line, file=sys.stderr)
    return 0


def _write(
    prompts: Sequence[str], generation: "Generation", tokenizer: "Tokenizer", shown: bool
) -> list[str]:
    """The texts after the prompts. One after another is shown, as it comes: a later one begins when
    those before it have ended."""
    from gqa_scaling.inference.text import texts_of

    written, shown_of = [""] * len(prompts), [0] * len(prompts)
    row = 0

    def show() -> None:
        nonlocal row
        while row < len(prompts):
            text = prompts[row] + written[row]
            print(_printable(text[shown_of[row] :]), end="", flush=True)
            shown_of[row] = len(text)
            if generation.ended[row] is None:
                return
            print("\n" if row + 1 < len(prompts) else "", flush=True)
            row += 1

    if shown:
        show()
    for texts in texts_of(generation, tokenizer):
        written = texts
        if shown:
            show()
    return written


def _printable(text: str) -> str:
    """For a terminal, which must not be told anything by what a model writes."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _cache_error(args: argparse.Namespace, generation: "Generation") -> Any:
    import numpy as np

    from gqa_scaling.inference.accuracy import cache_error

    whole = [
        [*prompt.tolist(), *made]
        for prompt, made in zip(generation.prompts, generation.made, strict=True)
    ]
    decoder = generation.decoder
    rows = decoder.mesh.shape["data"]
    longest = np.array(max(whole, key=len))
    return cache_error(decoder, np.tile(longest, (rows, 1)), args.cache or decoder.config.dtype)


def _totals(generation: "Generation") -> dict[str, float]:
    made = sum(map(len, generation.made))
    after_first = generation.seconds - generation.first_token_seconds
    steps = max(len(row) for row in generation.made) - 1
    return {
        "prompt_tokens": int(generation.lengths.sum()),
        "tokens": made,
        "compile_seconds": generation.compile_seconds,
        "first_token_seconds": generation.first_token_seconds,
        "seconds": generation.seconds,
        "tokens_per_second": made / generation.seconds,
        "seconds_per_step": after_first / steps if steps > 0 else 0.0,
    }


def _as_json(
    args: argparse.Namespace, generation: "Generation", texts: list[str], error: Any
) -> dict[str, Any]:
    rows = zip(
        args.prompt, texts, generation.lengths, generation.made, generation.ended, strict=True
    )
    found = [
        {
            "prompt": prompt,
            "text": text,
            "prompt_tokens": int(length),
            "tokens": made,
            "ended": ended,
        }
        for prompt, text, length, made, ended in rows
    ]
    measured = {} if error is None else {"cache_error": error.to_dict()}
    return {"texts": found, **_totals(generation), **measured}


def _summary(generation: "Generation", context: int, error: Any) -> list[str]:
    t = _totals(generation)
    lines = [
        f"{t['prompt_tokens']:,} prompt tokens, first token after {t['first_token_seconds']:.3f} s, "
        f"{t['tokens']:,} tokens in {t['seconds']:.2f} s: {t['tokens_per_second']:.1f} tokens/s "
        f"(after {t['compile_seconds']:.1f} s to compile)"
    ]
    full = generation.ended.count("context")
    if full:
        texts = "the text ends" if len(generation.ended) == 1 else f"{full} texts end"
        lines.append(f"{texts} with the context of {context:,} tokens: --context makes it longer")
    return lines + ([] if error is None else [error.sentence])


VERBS: dict[str, Verb] = {
    "generate": (_generate, "have a trained model write text", _add_generate),
}
