// What heads with a pattern read: context_sharding.py's arithmetic of blocks, at real-valued layers.

"use strict";

const Patterns = (() => {
  /** S(T) of heads that see blocks: keys read for the last token (HeadPattern.keys). */
  function keysRead([block, local, stride, offset, sinks], context) {
    const i = Math.floor((context - 1) / block);
    const near = Math.min(i + 1, local);
    const stripes = (m) => Math.floor((m + stride - 1 - ((stride - offset) % stride)) / stride);
    const far = i + 1 - near, first = Math.min(far, sinks);
    const live = near + (stride === null ? first : first + stripes(far) - stripes(first));
    return (live - 1) * block + ((context - 1) % block) + 1;
  }

  /** L T_eff of models of 0 to `most` layers (context_sharding.keys_by_depth). */
  function keysByDepth({ sparse, dense_layers }, context, most) {
    const turn = sparse.slice(0, most).map((layer) => {
      const keys = layer.map((head) => (head === null ? context : keysRead(head, context)));
      return keys.reduce((a, b) => a + b) / keys.length;
    });
    const named = new Uint8Array(most);
    let last = 0;
    for (const term of dense_layers ? dense_layers.split(", ") : []) {
      const [word, number] = term.includes(" ") ? term.split(" ") : ["", term];
      const k = Number(number);
      if (word === "every") for (let i = k - 1; i < most; i += k) named[i] = 1;
      else if (word === "first") named.fill(1, 0, Math.min(k, most));
      else if (word === "last") last = Math.max(last, k);
      else if (k < most) named[k] = 1;
    }
    const before = [0], sums = [0];
    for (let i = 0; i < most; i++) {
      before.push(before[i] + named[i]);
      sums.push(sums[i] + turn[i % turn.length]);
    }
    return Array.from({ length: most + 1 }, (_, L) => {
      const n = before[Math.max(0, L - last)] + Math.min(last, L);
      return n * context + sums[L - n];
    });
  }

  /** T_eff at real-valued layers: the context itself where a configuration is dense. */
  function effectiveContext(pattern, layers, context, interpolate) {
    if (!pattern) return layers.map(() => context);
    const finite = layers.map((L) => (Number.isFinite(L) ? L : 1));
    const most = 2 ** Math.ceil(Math.log2(finite.reduce((a, b) => Math.max(a, b), 0) + 1));
    const table = keysByDepth(pattern, context, most), depth = table.map((_, i) => i);
    return finite.map((L) => interpolate(L, depth, table) / L);
  }

  return { effectiveContext };
})();
