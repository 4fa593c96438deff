// The page in words: numbers as people read them, as units.py and report/table.py write them, and the answer
// in sentences, as report/sentences.py says it.

"use strict";

const Words = (() => {
  // ------------------------------------------------------------------------- numbers as people read them

  /** A number with `digits` decimals; exact halves go to the even digit, as in Python. */
  function fixed(value, digits) {
    const scale = 10 ** digits, below = Math.floor(value * scale);
    const half = Number.isInteger(value * 2 ** (digits + 1)) && value * scale - below === 0.5;
    if (half && below % 2 === 0) return (below / scale).toFixed(digits);
    return half ? ((below + 1) / scale).toFixed(digits) : value.toFixed(digits);
  }

  /** `digits` significant digits without trailing zeros: Python's format "g". */
  function significant(value, digits) {
    if (value === 0) return "0";
    const [mantissa, power] = value.toExponential(digits - 1).split("e"), exponent = Number(power);
    const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
    if (exponent >= -4 && exponent < digits) return bare(fixed(value, Math.max(0, digits - 1 - exponent)));
    const scaled = value / 10 ** exponent, exact = scaled * 10 ** exponent === value;
    const written = exact ? fixed(scaled, digits - 1) : mantissa;
    return `${bare(written)}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }

  /** Three significant digits with an SI prefix, such as 1.69G (units.quantity). */
  function quantity(value) {
    if (!Number.isFinite(value)) return value > 0 ? "out of reach" : "-";
    if (Math.abs(value) >= 1e18) return significant(value, 3);
    for (const [size, prefix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= 0.9995 * size) {
        const scaled = value / size, digits = Math.abs(scaled) < 9.995 ? 2 : Math.abs(scaled) < 99.95 ? 1 : 0;
        return fixed(scaled, digits) + prefix;
      }
    return significant(value, 3);
  }

  /** A share as a percentage, a dash when there is none (table.percent). */
  function percent(value, digits = 1) {
    return Number.isFinite(value) ? `${fixed(100 * value, digits)}%` : "-";
  }

  // ------------------------------------------------------------------------------------ the answer

  const margin = (value) => `${significant(100 * value, 6)}%`;
  const several = (n, what) => `${n} ${what}${n > 1 ? "s" : ""}`;
  const listed = (choices) => choices.map((c) => c.configuration.name).join(choices.some((c) => c.configuration.pattern) ? ", " : " ");
  const span = (ends, write) => ends.map(write).join(" to ");
  const less = (saving) => `${percent(Math.abs(saving))} ${saving >= 0 ? "less" : "more"}`;
  const baselineLabel = (carried, s) => carried.baselines.find((b) => b.name === s.baseline)?.label || s.baseline;
  const told = (value) => value.toLocaleString("en-US");
  const goal = (a) => `${significant(a.loss, 6)} nats at ${told(a.context)} tokens`;

  const THINGS = { context: "contexts", batch: "batches", head_dim: "head sizes", n: "models" };

  /** Why seconds decide nothing, "" where they may (clock.untimed). */
  function untimedIn(a) {
    const times = (factor) => {
      const value = Math.max(factor, 1 / factor), number = value < 9.95 ? fixed(value, 1) : told(Math.round(value));
      return factor > 1 ? `${number} times the most` : `1/${number} of the least`;
    };
    const far = Object.entries(a.untimed).map(([name, factor]) => `${THINGS[name]} ${times(factor)}`);
    return far.length ? `seconds of ${far.join(", ")} that was timed` : "";
  }

  /** The answer as report/sentences.py says it, but for what is gained at equal cost. */
  function sentence(carried, model, a, s) {
    const { best } = a, c = best.configuration, base = baselineLabel(carried, s);
    const start = (carried.demonstration ? "Demonstration, too small to decide by. " : "") +
      (carried.doubt ? `NOT TO BE RELIED ON: ${carried.doubt}. ` : "");
    const allowed = a.choices.filter((each) => each.configuration.n_kv_heads % s.kv_multiple === 0);
    if (!allowed.length) return `${start}No candidate has KV heads that are a multiple of ${s.kv_multiple}.`;
    if (!best.reached && allowed.some((each) => Number.isFinite(each.n)))
      return `${start}No configuration that reaches ${goal(a)} fits --fit-gib ${significant(s.limit_gib, 6)} (GiB), by these curves.`;
    if (!best.reached) return `${start}No configuration reaches ${goal(a)} with what must hold at any size that can be built, by these curves: it is out of reach.`;
    const out = [], untimed = untimedIn(a), others = a.tied.slice(1).filter((t) => !a.equivalent.includes(t));
    const sparse = c.pattern ? ` with pattern ${c.pattern.label} (T_eff ${told(Math.round(best.effective))} tokens)` : "";
    let saving = `${base} never reaches that loss`;
    if (c.name === s.baseline) saving = "it is the baseline itself";
    else if (Number.isFinite(best.saving[s.objective])) {
      const kinds = [...new Set([s.objective, "memory", "flops", "z"])];
      const [first, ...rest] = kinds.map((kind) => `${less(best.saving[kind])} ${carried.objectives[kind]}`);
      const [low, high] = best.saving_interval[s.objective];
      const ends = best.saving[s.objective] >= 0 ? [low, high] : [-high, -low];
      const whole = Numerics.wholeModel(model, s.baseline) && s.loss !== null;
      const at = whole ? `, whose loss is ${fixed(a.baseline.loss, 3)}` : " at the same loss";
      saving = `${first} than ${base}${at} (90% interval ${span(ends, (v) => percent(v))}), with ${rest.join(" and ")}`;
    }
    out.push(`${start}For ${goal(a)}, take ${several(c.n_heads, "query head")} and ${several(c.n_kv_heads, "KV head")}${sparse} at ${quantity(best.n)} parameters: ${saving}.`);
    out.push(untimed ? `NOT DECIDED which is the cheapest: ${untimed}.` : others.length ? `The noise leaves open whether ${listed(others)} ${others.length > 1 ? "are" : "is"} as good.`
      : `It is the cheapest in ${percent(best.probability, 0)} of the refits.`);
    if (a.equivalent.length && !untimed) out.push(`As good, within ${margin(s.indifference)} of the cheapest in 90% of the refits: ${listed(a.equivalent)}.`);
    if (best.unreachable > 0.05) out.push(`${percent(best.unreachable, 0)} of the refits never reach that loss with it, at any size that can be built within what must hold.`);
    if (c.known !== "measured") {
      out.push(`Its heads were never trained: they are ${c.known_words}.`);
      if (a.safest) out.push(`The cheapest that was trained is ${a.safest.configuration.name}, ${percent(a.safest.excess)} dearer.`);
    }
    if (best.extrapolated) out.push("Its size lies outside the fitted ones.");
    if (c.pattern && a.context > carried.train_context) out.push(`That its pattern costs no more loss there than at the ${told(carried.train_context)} tokens it was trained at is untested.`);
    return out.join(" ");
  }

  const bytesText = (v) => {
    for (const [size, prefix] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
      if (v >= 0.9995 * size) return v / size < 99.5 ? `${fixed(v / size, 2)} ${prefix}` : `${fixed(v / size, 0)} ${prefix}`;
    return Number.isFinite(v) ? `${fixed(v, 0)} B` : "out of reach";
  };
  const costText = (kind, v) => (kind === "bytes" ? bytesText(v) : kind === "seconds" || kind === "dollars" ? (Number.isFinite(v) ? significant(v, 3) : "-") : quantity(v));

  function standing(a, choice) {
    if (choice.reached && untimedIn(a)) return "not decided";
    if (choice === a.best && choice.reached) return "cheapest";
    if (a.equivalent.includes(choice)) return "as good";
    if (choice.tied) return "open";
    return choice.reached ? "dearer" : "out of reach";
  }

  return { fixed, significant, quantity, percent, margin, span, told, goal, baselineLabel, sentence, standing, costText };
})();
