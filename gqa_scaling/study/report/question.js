// The question that the page is asked: what may be asked, its address, and the command that prints the same.

"use strict";

/** Everything about questions to what carried.py wrote; `model` is that, prepared by numerics.js. */
function Asking(carried, model) {
  const dense = carried.configurations.every((c) => !c.pattern);
  const everyone = carried.configurations.filter((c) => c.ranked).map((c) => c.name);
  const opening = { ...carried.asked, candidates: everyone };
  const [lowPower, highPower] = carried.limits.power, [lowLoss, highLoss] = carried.limits.loss;
  const [, mostContext] = carried.limits.context;

  // What each field may be, as Question and Serving refuse it: least, most, whole, and its option.
  const NUMBERS = {
    context: { least: 1, most: mostContext, whole: true, flag: "contexts", unit: "tokens" },
    loss: { least: lowLoss, most: highLoss, flag: "losses", unit: "nats", empty: carried.asked.loss === null },
    lambda: { least: 0, most: 1, flag: "lambda" },
    alpha: { least: lowPower, most: highPower, flag: "alpha" },
    beta: { least: lowPower, most: highPower, flag: "beta" },
    indifference: { least: 0, most: 1, flag: "indifference", percent: true },
    batch: { least: 1, most: 1e9, whole: true, flag: "batch" },
    weight_bytes: { least: 0.01, most: 100, flag: "weight-bytes" },
    cache_bytes: { least: 0.01, most: 100, flag: "cache-bytes" },
    limit_gib: { least: 1e-6, most: 1e12, flag: "fit-gib", empty: true },
    kv_multiple: { least: 1, most: 10000, whole: true, flag: "kv-multiple" },
    price: { least: 0, most: 1e6, flag: "price", empty: true },
  };
  const NAMES = {
    lambda: "λ", alpha: "α", beta: "β", loss: "target loss", limit_gib: "at most, GiB", indifference: "as good within, %", kv_multiple: "multiple of KV heads", weight_bytes: "bytes a weight", cache_bytes: "bytes a cached value",
  };
  const WORDS = ["baseline", "convention", "objective", "hardware"];

  /** What is wrong with a question, in one line that names value, rule and remedy; "" when nothing is. */
  function refusal(s) {
    for (const [name, rule] of Object.entries(NUMBERS)) {
      const value = s[name], scale = rule.percent ? 100 : 1;
      if (value === null && rule.empty) continue;
      const holds = typeof value === "number" && value >= rule.least && value <= rule.most && !(rule.whole && !Number.isInteger(value));
      if (!holds) return [name, `${NAMES[name] || name} must be ${rule.whole ? "a whole number " : ""}from ${scale * rule.least} to ${scale * rule.most}`];
    }
    if (!s.candidates.length) return ["", "rank at least one configuration"];
    if (["seconds", "dollars"].includes(s.objective) && !s.hardware) return ["hardware", `${carried.objectives[s.objective]} need hardware: name it under “How it is served”`];
    const timed = s.hardware && carried.hardware[s.hardware].timed;
    for (const name of ["weight_bytes", "cache_bytes"])
      if (timed && s[name] !== timed[name]) return [name, `${s.hardware} was timed with ${timed[name]} ${NAMES[name]}`];
    if (timed && timed.output_tokens >= s.context) return ["context", `context must be more than the ${timed.output_tokens} tokens of output`];
    if (timed && timed.output_tokens && !dense) return ["hardware", "the prefill of patterns is counted by the command line alone"];
    if (s.objective === "dollars" && !(asked(s).price > 0)) return ["price", "dollars need a price above 0 an hour"];
    if (!carried.baselines.some((b) => b.name === s.baseline) && !Numerics.wholeModel(model, s.baseline))
      return ["whole-text", "one model is written 24,8@L36d1536, of heads that have a curve here"];
    if (s.loss === null && !Numerics.wholeModel(model, s.baseline)) return ["loss", "name a target loss"];
    return ["", ""];
  }

  /** What numerics.js is asked. */
  function asked(s) {
    const hardware = s.hardware ? model.hardware[s.hardware] : null;
    return {
      ...s, hardware, ranked: s.candidates,
      price: s.price ?? hardware?.price ?? NaN,
      limit_bytes: s.limit_gib === null ? Infinity : s.limit_gib * 2 ** 30,
    };
  }

  // -------------------------------------------------------------------------- the address, the command

  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

  function toAddress(s) {
    const moved = [...Object.keys(NUMBERS), ...WORDS].filter((name) => !same(s[name], opening[name]));
    const out = moved.map((name) => [name, s[name] ?? ""]);
    if (!same(s.candidates, everyone)) out.push(["candidates", s.candidates.join("|")]);
    return out.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  }

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text; // not written by this page
    }
  }

  /** The question in an address; what it does not name is as the page opens. */
  function fromAddress(text) {
    const given = new Map(text.split("&").map((each) => decoded(each).split(/=(.*)/s)));
    const s = { ...opening };
    for (const name of Object.keys(NUMBERS))
      if (given.has(name)) s[name] = given.get(name) === "" ? null : Number(given.get(name));
    for (const name of WORDS) if (given.has(name)) s[name] = given.get(name) || null;
    if (given.has("candidates")) {
      const named = given.get("candidates").split("|");
      s.candidates = everyone.filter((name) => named.includes(name));
    }
    if (s.hardware && !Object.hasOwn(carried.hardware, s.hardware)) s.hardware = opening.hardware;
    if (!Object.hasOwn(carried.objectives, s.objective)) s.objective = opening.objective;
    if (!["per_token", "per_sequence"].includes(s.convention)) s.convention = opening.convention;
    return s;
  }

  const bare = (name) => name.replace(/^\(|\).*$/g, "");

  /** The command that prints the same, and what it cannot say. */
  function command(s) {
    const words = [carried.command, "--contexts", s.context];
    if (s.loss !== null) words.push("--losses", s.loss);
    const plain = carried.defaults;
    const add = (flag, value) => words.push(`--${flag}`, value);
    const row = s.hardware && carried.hardware[s.hardware];
    for (const name of ["lambda", "alpha", "beta", "batch", "weight_bytes", "cache_bytes", "limit_gib", "kv_multiple"])
      if (!same(s[name], plain[name]) && !(row?.timed && name.endsWith("_bytes"))) add(NUMBERS[name].flag, s[name]);
    if (!same(s.indifference, plain.indifference)) add("indifference", Number((100 * s.indifference).toPrecision(12)));
    if (s.convention !== plain.convention) add("convention", s.convention);
    if (row?.timed || s.objective !== plain.objective) add("objective", s.objective);
    if (row?.timed) words.push(row.option);
    else if (s.hardware) add("hardware", s.hardware);
    if (s.hardware && s.price !== null && (row.timed ? s.price > 0 : s.price !== row.price)) add("price", s.price);
    if (s.baseline !== plain.baseline) add("baseline", bare(s.baseline));
    let note = "";
    if (same(s.candidates, everyone)) {
      if (carried.candidates.length) words.push("--candidates", ...carried.candidates);
    } else {
      if (dense && !/ --law /.test(carried.command)) add("law", carried.law);
      if (dense) words.push("--candidates", ...s.candidates.map(bare));
      else note = "The command ranks all configurations: --candidates cannot name patterns.";
    }
    if (!dense && /\) /.test(s.baseline) && s.baseline !== plain.baseline) note += " No command names a baseline with a pattern.";
    words.push("--ranking");
    return [words.join(" "), note];
  }

  return { NUMBERS, dense, everyone, opening, refusal, asked, toAddress, fromAddress, command };
}
