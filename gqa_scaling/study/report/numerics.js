// The numbers of the page: from fitted curves and their refits to sizes, costs and a ranking.
//
// What study/curves.py, shapes.py, serving.py, baseline.py, ranking.py and uncertainty.py compute, with the
// same conventions and in the same order, so that the page prints the digits of the command line. Nothing
// here knows of a page. Rows are the point estimate and then every refit, as in `frontier.with_draws`.
// Losses are in nats, N in parameters without embeddings, contexts in tokens.

"use strict";

const Numerics = (() => {
  const LEVEL = 0.9; // of every interval, as in study/uncertainty.py
  const WHOLE = "whole model"; // whose error it is by the clock, as in study/clock.py
  const LLAMA3_KV = 8; // KV heads of the published family, fewer where a model has fewer query heads

  // ---------------------------------------------------------------------------------- what is carried

  const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

  /** The numbers that `carried.packed` wrote: little-endian float32 or float64 in base64. */
  function unpack({ kind, data }) {
    const value = new Uint8Array(128);
    [...DIGITS].forEach((letter, i) => (value[letter.charCodeAt(0)] = i));
    const length = Math.floor((data.replace(/=+$/, "").length * 3) / 4);
    const bytes = new Uint8Array(length + 3);
    for (let i = 0, at = 0; i < data.length; i += 4, at += 3) {
      const [a, b, c, d] = [0, 1, 2, 3].map((k) => value[data.charCodeAt(i + k) & 127]);
      bytes[at] = (a << 2) | (b >> 4);
      bytes[at + 1] = (b << 4) | (c >> 2);
      bytes[at + 2] = (c << 6) | d;
    }
    const view = new DataView(bytes.buffer), size = kind === "f8" ? 8 : 4;
    return Float64Array.from({ length: length / size }, (_, i) =>
      size === 8 ? view.getFloat64(8 * i, true) : view.getFloat32(4 * i, true));
  }

  /** Rows of one number: the point estimate, then what each refit adds to it. */
  function rowsOf(point, moved) {
    return Float64Array.from({ length: moved.length + 1 }, (_, i) => (i ? point + moved[i - 1] : point));
  }

  /** Ready for `answer`: what carried.py wrote, its numbers unpacked. */
  function prepare(carried) {
    const { head_dim, ladder } = carried;
    const many = carried.configurations.length;
    const u = unpack(carried.draws.u), b = unpack(carried.draws.b);
    const refits = u.length / many;
    const part = (all, k) => all.subarray(k * refits, (k + 1) * refits);
    const configurations = carried.configurations.map((c, k) => ({
      ...c,
      u: rowsOf(c.u, part(u, k)),
      b: rowsOf(c.b, part(b, k)),
      logN: c.log_n && unpack(c.log_n),
      sizes: sizesOf(c.n_heads, c.n_kv_heads, head_dim, ladder),
    }));
    return {
      ...carried,
      configurations,
      rows: refits + 1,
      floor: rowsOf(carried.floor, unpack(carried.draws.floor)),
      hardware: Object.fromEntries(Object.entries(carried.hardware).map(([name, row]) => [name, !row.errors ? row
        : { ...row, errors: Object.fromEntries(Object.entries(row.errors).map(([of, v]) => [of, unpack(v)])) }])),
      logBackbone: carried.log_backbone && unpack(carried.log_backbone),
      family: carried.family && {
        ...carried.family,
        values: carried.family.names.map((_, i) => {
          const all = unpack(carried.family.rows), rows = refits + 1;
          return all.subarray(i * rows, (i + 1) * rows);
        }),
      },
    };
  }

  /** The same without its refits: only the point estimate, for pictures of many questions at once. */
  function pointOnly(model) {
    const first = (rows) => rows.subarray(0, 1);
    const configurations = model.configurations.map((c) => ({ ...c, u: first(c.u), b: first(c.b) }));
    const family = model.family && { ...model.family, values: model.family.values.map(first) };
    return { ...model, configurations, family, rows: 1, floor: first(model.floor) };
  }

  // --------------------------------------------------------------------------------------- arithmetic

  /** Straight between points, level beyond them; `x` ascending (numpy.interp). */
  function interpolate(at, x, y) {
    const last = x.length - 1;
    if (!(at > x[0])) return y[0];
    if (at >= x[last]) return y[last];
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] <= at) low = middle;
      else high = middle;
    }
    return ((y[low + 1] - y[low]) / (x[low + 1] - x[low])) * (at - x[low]) + y[low];
  }

  /** The central 90% of draws: numpy.percentile by its method "inverted_cdf". */
  function interval(draws) {
    const sorted = Float64Array.from(draws).filter((v) => !Number.isNaN(v)).sort();
    if (!sorted.length) return [NaN, NaN];
    const tail = 50 * (1 - LEVEL);
    return [tail, 100 - tail].map((percent) => {
      const index = Math.ceil(sorted.length * (percent / 100) - 1);
      return sorted[Math.max(index, 0)];
    });
  }

  /** 8 L d^2 + 2 L d d_h (n_h + n_kv) (costs.n_formula). */
  function nFormula(layers, width, heads, kv, headDim) {
    return 8 * layers * width ** 2 + 2 * layers * width * headDim * (heads + kv);
  }

  // ----------------------------------------------------------------------------- sizes and their shapes

  /** The ladder's sizes of a configuration by N: [N, d / L]. */
  function sizesOf(heads, kv, headDim, ladder) {
    const sizes = ladder.map(([L, d]) => [nFormula(L, d, heads, kv, headDim), d / L]);
    sizes.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    return { n: sizes.map((s) => s[0]), ratio: sizes.map((s) => s[1]) };
  }

  /** The real-valued layers and width of n = n_formula (shapes.shapes). */
  function shape(n, sizes, headsTogether, headDim) {
    if (!Number.isFinite(n)) return [Infinity, Infinity];
    const ratio = interpolate(n, sizes.n, sizes.ratio);
    const cubic = 8 * ratio ** 2, square = 2 * ratio * headDim * headsTogether;
    let layers = Math.cbrt(n / cubic); // above the root: Newton falls onto it monotonically
    for (let i = 0; i < 60; i++) {
      const value = cubic * layers ** 3 + square * layers ** 2 - n;
      const step = value / (3 * cubic * layers ** 2 + 2 * square * layers);
      layers -= step;
      if (Math.abs(step) <= 1e-14 * layers) break;
    }
    return [layers, ratio * layers];
  }

  /** Layers and width of models that the fit counts as n (Family.shape). */
  function shapeOf(model, c, n) {
    const formula = n * interpolate(Math.log(Number.isFinite(n) ? n : 1), c.ratio_log_n, c.ratio);
    return shape(formula, c.sizes, c.n_heads + c.n_kv_heads, model.head_dim);
  }

  /** N*, infinite beyond reach; below it the least size, which does as well (Family.within). */
  function within(n, [low, high]) {
    return n > high ? Infinity : Math.max(n, low);
  }

  /** N at which a configuration's curve reaches the targets, one for each row (Curves.n_star). */
  function nStar(model, c, targets) {
    const x = model.logBackbone, last = x && x.length - 1;
    return targets.map((target, row) => {
      const excess = target - model.floor[row], b = c.b[row];
      if (!(excess > 0 && b > 0)) return Infinity;
      let n = Math.exp(c.centre + (c.u[row] - Math.log(excess)) / b);
      if (x && Number.isFinite(n)) {
        const at = Math.max(Math.log(Math.max(n, 1e-300)), x[0]);
        n = at < x[last] ? Math.exp(interpolate(at, x, c.logN)) : Infinity;
      }
      return within(n, c.reach);
    });
  }

  /** The loss of a configuration at N in one row (Curves.loss). */
  function lossAt(model, c, n, row = 0) {
    const x = model.logBackbone;
    const size = x ? interpolate(Math.log(n), c.logN, x) : Math.log(n);
    return model.floor[row] + Math.exp(c.u[row] - c.b[row] * (size - c.centre));
  }

  // ------------------------------------------------------------------------------------------- costs

  /** A part of Z; what has no weight counts for nothing, also of a model out of reach (costs.HardwareCost). */
  const weighed = (weight, part) => (weight ? weight * part : 0);

  /** Costs of models whose shapes are known, row by row (Deployment.costs_of_shape). */
  function costsOfShape(model, asked, n, heads, kv, layers, width, keys) {
    const d = model.head_dim, { hardware } = asked;
    const out = { n, layers, width, keys };
    for (const name of ["memory", "flops", "z", "bytes", "seconds", "dollars"])
      out[name] = new Float64Array(n.length);
    for (let i = 0; i < n.length; i++) {
      const L = layers[i], cached = 2 * keys[i] * L * d * kv[i];
      const token = 2 * n[i] + 4 * keys[i] * L * d * heads[i];
      const memory = n[i] + cached;
      const flops = asked.convention === "per_token" ? token : (asked.context * token) / 2;
      const read = asked.weight_bytes * n[i] + asked.cache_bytes * asked.batch * cached;
      out.memory[i] = memory;
      out.flops[i] = flops;
      out.z[i] = weighed(asked.lambda, memory ** asked.alpha) + weighed(1 - asked.lambda, flops ** asked.beta);
      out.bytes[i] = read + asked.weight_bytes * (model.embeddings * width[i]);
      const shape = { n: n[i], L, d, heads: heads[i], kv: kv[i], width: width[i], keys: keys[i] };
      const seconds = !hardware ? NaN
        : hardware.timed ? Clock.timedSeconds(hardware.timed, asked, shape)
        : Clock.decodeSeconds(hardware, asked.batch, token, read);
      out.seconds[i] = seconds;
      out.dollars[i] = hardware ? ((seconds * asked.price) / 3600) * 1e6 : NaN;
    }
    return out;
  }

  /** Costs of a configuration at sizes N (Deployment.costs). */
  function costsOf(model, asked, c, n) {
    const layers = new Float64Array(n.length), width = new Float64Array(n.length);
    n.forEach((v, i) => ([layers[i], width[i]] = shapeOf(model, c, v)));
    return reshaped(model, asked, c, { n, layers, width });
  }

  /** The same shapes at another context; `whose` error the clock has of them. */
  function reshaped(model, asked, c, { n, layers, width }, whose = c.name) {
    const keys = Patterns.effectiveContext(c.pattern, layers, asked.context, interpolate);
    const heads = new Float64Array(n.length).fill(c.n_heads), kv = heads.map(() => c.n_kv_heads);
    return Clock.drawn(asked, costsOfShape(model, asked, n, heads, kv, layers, width, keys), whose);
  }

  /** The cost that is to be least, infinite where what must hold does not (Deployment.cost). */
  function objectiveCost(asked, c, costs) {
    const allowed = c.n_kv_heads % asked.kv_multiple === 0;
    return costs[asked.objective].map((v, i) =>
      allowed && costs.bytes[i] <= asked.limit_bytes ? v : Infinity);
  }

  // ---------------------------------------------------------------------------------------- baselines

  /** What savings are against at the targets, one for each row (baseline.reference). */
  function reference(model, asked, targets) {
    const { baseline } = asked;
    if (baseline === "llama3") return llama3(model, asked, targets);
    const whole = wholeModel(model, baseline);
    if (!whole) {
      const c = model.configurations.find((each) => each.name === baseline);
      return { loss: targets, ...costsOf(model, asked, c, nStar(model, c, targets)) };
    }
    const { c, n, L, d } = whole, same = (value) => new Float64Array(model.rows).fill(value);
    return { loss: whole.loss, ...reshaped(model, asked, c, { n: same(n), layers: same(L), width: same(d) }, WHOLE) };
  }

  /** The one model that 24,8@L36d1536 names, its N as the fit counts and its losses; or null. */
  function wholeModel(model, text) {
    const found = /^(\d+),(\d+)@L(\d+)d(\d+)$/.exec(text);
    if (!found) return null;
    const [h, kv, L, d] = found.slice(1).map(Number);
    const c = model.configurations.find((each) => each.n_heads === h && each.n_kv_heads === kv && !each.pattern);
    if (!c || Math.min(h, kv, L, d) < 1) return null;
    const formula = nFormula(L, d, h, kv, model.head_dim);
    const logs = c.ratio_log_n.map((v, i) => v + Math.log(c.ratio[i]));
    const n = formula / interpolate(Math.log(formula), logs, c.ratio);
    return { c, n, L, d, loss: Float64Array.from(model.floor, (_, row) => lossAt(model, c, n, row)) };
  }

  /** log2 of a number of heads as the law "fading" bends it (models.Fading, models._gain). */
  function bend(heads, most, g) {
    const gain = (m) => {
      const x = Math.log(m);
      if (Math.abs(g) < 1e-4) return x - (g * x ** 2) / 2;
      return -Math.expm1(-Math.min(Math.max(g * x, -50), 50)) / g;
    };
    return (Math.log2(most) * gain(heads)) / gain(most);
  }

  /** The sizes of the published Llama-3 family that reach the targets (baseline._llama3). */
  function llama3(model, asked, targets) {
    const { x, layers, width, names, values, centre, most, counted } = model.family;
    const at = (name, row) => (names.includes(name) ? values[names.indexOf(name)][row] : 0);
    const queries = width.map((d) => d / model.head_dim);
    const kvs = queries.map((h) => Math.min(h, LLAMA3_KV));
    const fading = names.includes("g");
    const n = new Float64Array(model.rows), L = n.slice(), d = n.slice();
    targets.forEach((target, row) => {
      const [p, q, g] = ["p", "q", "g"].map((name) => at(name, row));
      const gained = (heads, top) => (fading ? bend(heads, top, g) : Math.log2(heads));
      const loss = (i) => {
        const heads = p * gained(queries[i], most[0]) + q * gained(kvs[i], most[1]);
        const u = at("u", row) + at("s", row) - heads, b = at("b", row) + at("t", row);
        return at("E", row) + Math.exp(u - b * (x[i] - centre));
      };
      let i = 0, before = NaN, here = loss(0);
      while (!(here <= target) && ++i < x.length) [before, here] = [here, loss(i)];
      const found = i === x.length ? Infinity
        : i === 0 ? x[0] : x[i - 1] + ((before - target) / (before - here)) * (x[i] - x[i - 1]);
      if (found === Infinity) return void (n[row] = L[row] = d[row] = Infinity);
      L[row] = interpolate(found, x, layers);
      d[row] = interpolate(found, x, width);
      const heads = d[row] / model.head_dim, backbone = nFormula(L[row], d[row], 0, 0, 0);
      const share = interpolate(backbone, counted.n, counted.share);
      n[row] = nFormula(L[row], d[row], heads, Math.min(heads, LLAMA3_KV), model.head_dim) + share * backbone;
    });
    const heads = d.map((width) => width / model.head_dim);
    const keys = d.map(() => asked.context), kv = heads.map((h) => Math.min(h, LLAMA3_KV));
    return { loss: targets, ...Clock.drawn(asked, costsOfShape(model, asked, n, heads, kv, L, d, keys), "llama3") };
  }

  // ------------------------------------------------------------------------------------------ ranking

  /** Probability of being cheapest, and expected regret, of costs[k][draw] (ranking.decide). */
  function decide(costs) {
    const many = costs.length, draws = many ? costs[0].length : 0;
    const wins = new Array(many).fill(0), regret = new Array(many).fill(0), kept = [], least = [];
    for (let i = 0; i < draws; i++) {
      let first = 0;
      for (let k = 1; k < many; k++) if (costs[k][i] < costs[first][i]) first = k;
      if (!Number.isFinite(costs[first][i])) continue;
      wins[first] += 1;
      kept.push(i);
      least.push(costs[first][i]);
      for (let k = 0; k < many; k++) regret[k] += costs[k][i] / costs[first][i] - 1;
    }
    const of = kept.length;
    return {
      kept, least,
      probability: wins.map((w) => (of ? w / of : 0)),
      regret: regret.map((r) => (of ? r / of : NaN)),
    };
  }

  /** The configurations among which the draws do not decide, `first` ahead (ranking.tied). */
  function tied(near, first, draws) {
    const left = near.map((row) => Uint8Array.from(row)), count = near.map((row) => row.reduce((a, b) => a + b, 0));
    const out = [first];
    left[first].fill(0);
    const others = near.map((_, k) => k).filter((k) => k !== first).sort((a, b) => count[b] - count[a] || a - b);
    for (const k of draws ? others : []) {
      let any = 0;
      for (let i = 0; i < draws; i++) if (left.some((row) => row[i])) any += 1;
      if (1 - any / draws >= LEVEL - 1e-12) break;
      out.push(k);
      left[k].fill(0);
    }
    return out;
  }

  /** 1 - cost / reference, NaN where the reference is infinite (ranking.saved). */
  function saved(cost, reference) {
    if (!Number.isFinite(reference)) return NaN;
    const saving = Math.round((1 - cost / reference) * 1e12) / 1e12;
    return Number.isFinite(cost) ? saving + 0 : -Infinity;
  }

  /** The targets, one for each row: the loss that is asked for, or the baseline model's own. */
  function targetsOf(model, asked) {
    if (asked.loss !== null) return new Float64Array(model.rows).fill(asked.loss);
    return wholeModel(model, asked.baseline).loss;
  }

  /**
   * The answer to one question, cheapest first, as frontier.Answer has it.
   * `asked` names what is moved: context, loss, convention, lambda, alpha, beta, batch, weight_bytes,
   * cache_bytes, limit_bytes, kv_multiple, hardware, price, objective, indifference, baseline and
   * `ranked`, the names of the configurations in the study's order.
   */
  function answer(model, asked, sized = sizesAt(model, asked)) {
    const { targets, configurations } = sized, kinds = [...new Set(["z", "memory", "flops", asked.objective])];
    const base = reference(model, asked, targets);
    const costs = configurations.map((c, k) => reshaped(model, asked, c, sized.shapes[k]));
    const objective = configurations.map((c, k) => objectiveCost(asked, c, costs[k]));
    const draws = objective.map((row) => row.subarray(1));
    const { kept, least, probability, regret } = decide(draws);
    const near = draws.map((row) =>
      kept.map((i, j) => (row[i] <= (1 + asked.indifference) * least[j] ? 1 : 0)));
    const cheapest = objective.reduce((low, row) => Math.min(low, row[0]), Infinity);
    const choices = configurations.map((c, k) => ({
      configuration: c,
      k,
      n: costs[k].n[0],
      n_interval: interval(costs[k].n.subarray(1)),
      n_layers: costs[k].layers[0],
      d_model: costs[k].width[0],
      effective: costs[k].keys[0],
      memory: costs[k].memory[0],
      flops: costs[k].flops[0],
      z: costs[k].z[0],
      bytes: costs[k].bytes[0],
      seconds: costs[k].seconds[0],
      dollars: costs[k].dollars[0],
      cost: objective[k][0],
      reached: Number.isFinite(objective[k][0]),
      excess: Number.isFinite(objective[k][0]) ? objective[k][0] / cheapest - 1 : Infinity,
      probability: probability[k],
      regret: regret[k],
      within: kept.length ? near[k].reduce((a, b) => a + b, 0) / kept.length : 0,
      unreachable: draws[k].reduce((sum, v) => sum + (v === Infinity ? 1 : 0), 0) / draws[k].length,
      extrapolated: !(c.fitted[0] <= costs[k].n[0] && costs[k].n[0] <= c.fitted[1]),
      saving: Object.fromEntries(kinds.map((kind) => [kind, saved(costs[k][kind][0], base[kind][0])])),
      saving_interval: Object.fromEntries(kinds.map((kind) => [
        kind, interval(costs[k][kind].subarray(1).map((v, i) => saved(v, base[kind][i + 1]))),
      ])),
      // of the baseline's cost of the objective: what the pictures show
      share: objective[k][0] / base[asked.objective][0],
      share_interval: interval(draws[k].map((v, i) => v / base[asked.objective][i + 1])),
    }));
    const sorted = [...choices].sort((a, b) => (a.cost === b.cost ? 0 : a.cost - b.cost) ||
      b.probability - a.probability || a.configuration.order - b.configuration.order);
    const alike = sorted[0].reached ? tied(near, sorted[0].k, kept.length) : [];
    for (const choice of choices) choice.tied = alike.includes(choice.k);
    return {
      loss: targets[0],
      context: asked.context,
      choices: sorted,
      best: sorted[0],
      tied: alike.map((k) => choices[k]),
      equivalent: alike.slice(1).map((k) => choices[k]).filter((c) => c.within >= LEVEL),
      untimed: Clock.untimed(model.head_dim, asked, [sorted[0].n, base.n[0], ...["z", "seconds"].map((kind) => leastOf(sorted, kind).n)]),
      margin: sorted.length > 1 ? sorted[1].excess : Infinity,
      safest: sorted.find((c) => c.configuration.known === "measured" && c.reached) || null,
      baseline: {
        n: base.n[0], loss: base.loss[0], cost: base[asked.objective][0],
        unreachable: base.n.subarray(1).reduce((sum, v) => sum + (v === Infinity ? 1 : 0), 0) / (model.rows - 1),
      },
    };
  }

  /** The cheapest by another cost, of those that reach the loss (frontier.Answer.least). */
  function leastOf(choices, kind) {
    const reached = choices.filter((c) => c.reached);
    return (reached.length ? reached : choices).reduce((a, b) => (b[kind] < a[kind] ? b : a));
  }

  /** Sizes and shapes of what is ranked at one loss: no context enters them. */
  function sizesAt(model, asked) {
    const targets = targetsOf(model, asked);
    const configurations = model.configurations.filter((c) => asked.ranked.includes(c.name));
    const shapes = configurations.map((c) => {
      const n = nStar(model, c, targets), layers = new Float64Array(n.length), width = layers.slice();
      n.forEach((v, i) => ([layers[i], width[i]] = shapeOf(model, c, v)));
      return { n, layers, width };
    });
    return { targets, configurations, shapes };
  }

  return { LEVEL, prepare, pointOnly, answer, sizesAt, wholeModel, interval, unpack };
})();
