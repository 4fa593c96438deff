// Seconds of a machine, by its data sheet or as it was timed: how long a token takes, how far that may be off
// and how far beyond what was timed it lies.
//
// What study/serving.py, roofline.py and clock.py compute, with the same conventions. Nothing here knows of a page.

"use strict";

const Clock = (() => {
  /**
   * Seconds per decoded token: what takes longer of computing and of reading (serving.py).
   */
  function decodeSeconds(rates, batch, flopsOfToken, bytesRead) {
    const busy = (batch * flopsOfToken) / (rates.peak_flops * rates.mfu);
    return Math.max(busy, bytesRead / rates.bandwidth) / batch;
  }

  /** Seconds of a step on a machine that was timed, each term at its own rate (roofline.py). */
  function stepSeconds({ form, seconds_per }, work) {
    const part = (name) => (seconds_per[name] ? seconds_per[name] * work[name] : 0);
    const joined = (a, b) => (form === "max" ? Math.max(part(a), part(b)) : part(a) + part(b));
    return joined("weights", "linear") + joined("cache", "attention") + part("step") + part("layer");
  }

  /** Seconds per output token there, with its share of the prefill of dense heads (Deployment._timed). */
  function timedSeconds(timed, { batch, context }, { n, L, d, heads, kv, width, keys }) {
    const output = timed.vocab_size * width, read = n + output, each = 4 * L * d * heads;
    const decode = stepSeconds(timed.decode, {
      weights: timed.weight_bytes * read, cache: timed.value_bytes * batch * 2 * keys * L * d * kv,
      linear: 2 * batch * read, attention: batch * keys * each, step: 1, layer: L,
    });
    if (!timed.output_tokens) return decode / batch;
    const prompt = context - timed.output_tokens;
    const prefill = stepSeconds(timed.prefill, {
      weights: 0, cache: 0, linear: 2 * batch * (prompt * n + output),
      attention: batch * prompt * (prompt / 2) * each, step: 1, layer: L,
    });
    return decode / batch + prefill / (batch * timed.output_tokens);
  }

  /** Costs with the error of the clock drawn, row by row (Deployment.drawn). */
  function drawn(asked, costs, whose) {
    const errors = asked.hardware?.timed && asked.hardware.errors[whose];
    if (errors)
      for (const name of ["seconds", "dollars"]) costs[name] = costs[name].map((v, i) => v * Math.exp(errors[i]));
    return costs;
  }

  /**
   * What lies too far beyond what was timed to decide by seconds, of a question and these sizes: by
   * which factor (Clock.stretch, clock.too_far).
   */
  function untimed(headDim, asked, sizes) {
    const { ranges, far, timed } = asked.hardware || {}, out = {};
    if (!timed) return out;
    const given = { context: [asked.context], batch: [asked.batch], head_dim: [headDim], n: sizes.filter(Number.isFinite) };
    for (const [name, values] of Object.entries(given)) {
      const [low, high] = ranges[name], size = (v) => Math.abs(Math.log(v));
      const beyond = values.filter((v) => v < low || v > high).map((v) => v / (v > high ? high : low));
      if (beyond.length) out[name] = beyond.reduce((a, b) => (size(b) > size(a) ? b : a));
    }
    const byClock = ["seconds", "dollars"].includes(asked.objective);
    return Object.fromEntries(Object.entries(out).filter(([, v]) => byClock && !(1 / far < v && v < far)));
  }

  return { decodeSeconds, timedSeconds, drawn, untimed };
})();
