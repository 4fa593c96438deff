// The pictures that follow the question: what each configuration costs, and where the answer changes.

"use strict";

/** Those of a study; `move` asks for what is clicked on. */
function Pictures(carried, model, asking, move) {
  const { percent, quantity, significant, told, goal, baselineLabel, standing } = Words;
  const { ink, quiet, line, page, colour, MARKERS, sizeOf, dash, figure, readable, show, legible, beside, source } = Drawing;
  const by = (id) => document.getElementById(id);
  const { dense } = asking, point = Numerics.pointOnly(model);

  /** The height of a picture that follows, from its width; as tall as the controls where all stand in a row. */
  const tall = (place) => (innerWidth >= 1900 ? 520 : Math.min(420, Math.max(250, 0.55 * place.clientWidth)));

  /** What each configuration costs, in percent of the baseline. */
  function cost(a, s) {
    const shown = a.choices.filter((c) => Number.isFinite(c.share)).reverse();
    const tint = { cheapest: colour("#009E73"), "as good": colour("#56B4E9"), open: colour("#E69F00"), "not decided": colour("#E69F00"), dearer: quiet() };
    const base = baselineLabel(carried, s), kind = carried.objectives[s.objective];
    const f = figure({
      place: by("cost-picture"), title: `Cost at ${goal(a)}`, x: `${kind}, % of ${base}'s`, height: 92 + Math.max(tall(by("cost-picture")) - 60, 23 * shown.length),
      y_range: new (Bokeh.Models.get("FactorRange"))({ factors: shown.map((c) => c.configuration.name) }),
    });
    const data = source({
      y: shown.map((c) => c.configuration.name), x: shown.map((c) => 100 * c.share),
      low: shown.map((c) => 100 * Math.min(c.share_interval[0], c.share)),
      high: shown.map((c) => 100 * Math.max(c.share_interval[1], c.share)).map((v, i) => (Number.isFinite(v) ? v : 100 * shown[i].share)),
      colour: shown.map((c) => tint[standing(a, c)]), standing: shown.map((c) => standing(a, c)),
      n: shown.map((c) => quantity(c.n)), p: shown.map((c) => percent(c.probability, 0)), saved: shown.map((c) => percent(c.saving[s.objective])),
    });
    f.segment({ x0: { field: "low" }, x1: { field: "high" }, y0: { field: "y" }, y1: { field: "y" }, source: data, line_color: { field: "colour" }, line_width: 5, line_alpha: 0.45 });
    const dots = f.scatter({ x: { field: "x" }, y: { field: "y" }, source: data, size: 11, fill_color: { field: "colour" }, line_color: page(), legend_group: "standing" });
    f.add_layout(new (Bokeh.Models.get("Span"))({ location: 100, dimension: "height", line_color: quiet(), line_dash: "dashed" }));
    f.add_tools(new (Bokeh.Models.get("HoverTool"))({ renderers: [dots], tooltips: [["heads, KV", "@y"], ["", "@standing"], ["N*", "@n"], ["saves", "@saved"], ["P(best)", "@p"]] }));
    legible(f);
    f.legend.click_policy = "none";
    f.legend.orientation = "horizontal";
    beside(f, "below");
    by("cost-caption").textContent = `Each configuration at the size that reaches the loss, with 90% intervals; the dashed line is ${base}.`;
    return show(f, by("cost-picture"));
  }

  const doublings = (s) => {
    const low = Math.min(1024, ...carried.contexts, s.context), high = Math.max(1048576, ...carried.contexts, s.context);
    const out = [];
    for (let k = Math.ceil(Math.log2(low)); 2 ** k <= high; k++) out.push(2 ** k);
    const stride = Math.ceil(out.length / 14);
    return out.filter((_, i) => (out.length - 1 - i) % stride === 0);
  };
  const contextText = (t) => (t >= 2 ** 20 && t % 2 ** 20 === 0 ? `${t / 2 ** 20}M` : t >= 1024 && t % 1024 === 0 ? `${t / 1024}K` : told(t));

  /** Where the answer changes: costs along the context, and the cheapest over loss and context. */
  function contexts(s) {
    const places = doublings(s), sized = Numerics.sizesAt(point, asking.asked(s)), lines = new Map();
    for (const context of places)
      for (const c of Numerics.answer(point, { ...asking.asked(s), context }, sized).choices)
        if (Number.isFinite(c.share)) {
          const own = lines.get(c.configuration.name) || { c: c.configuration, x: [], y: [], rank: Infinity };
          own.x.push(context);
          own.y.push(100 * c.share);
          own.rank = Math.min(own.rank, c.excess);
          lines.set(c.configuration.name, own);
        }
    const base = baselineLabel(carried, s), kind = carried.objectives[s.objective];
    // the twelve that come nearest to being the cheapest anywhere: more lines say nothing
    const shown = [...lines.values()].sort((a, b) => a.rank - b.rank).slice(0, 12).sort((a, b) => a.c.order - b.c.order);
    const f = figure({ place: by("context-picture"), title: `Along the context at ${s.loss === null ? "the model's own loss" : `${significant(s.loss, 6)} nats`}`, x: "inference context (tokens)", y: `${kind}, % of ${base}'s`, height: tall(by("context-picture")), x_axis_type: "log" });
    for (const own of shown) {
      const data = source({ x: own.x, y: own.y, name: own.x.map(() => own.c.name) }), look = own.c.look;
      f.line({ x: { field: "x" }, y: { field: "y" }, source: data, line_color: colour(look.color), line_width: 1.8, line_dash: dash(look.linestyle), legend_label: own.c.name });
      f.scatter({ x: { field: "x" }, y: { field: "y" }, source: data, size: 0.7 * sizeOf(look.marker), marker: MARKERS[look.marker], fill_color: colour(look.color), line_color: colour(look.color), legend_label: own.c.name, name: "points" });
    }
    f.add_layout(new (Bokeh.Models.get("Span"))({ location: s.context, dimension: "height", line_color: ink(), line_width: 1 }));
    f.add_layout(new (Bokeh.Models.get("Span"))({ location: 100, dimension: "width", line_color: quiet(), line_dash: "dashed" }));
    f.add_tools(new (Bokeh.Models.get("HoverTool"))({ renderers: f.renderers.filter((r) => r.name === "points"), tooltips: [["heads, KV", "@name"], ["context", "@x{0,0}"], ["% of the baseline's", "@y{0.0}"]] }));
    const every = Math.ceil(places.length / (by("context-picture").clientWidth < 450 ? 5 : 11));
    readable(f.below.find((a) => "ticker" in a), places.filter((_, i) => i % every === 0), contextText);
    legible(f);
    f.legend.orientation = "horizontal";
    const wide = Math.max(...shown.map((own) => own.c.name.length), 5) * 7 + 44;
    f.legend.ncols = Math.min(Math.max(1, shown.length), Math.max(1, Math.floor((by("context-picture").clientWidth - 60) / wide)));
    f.height += 22 * Math.ceil(shown.length / f.legend.ncols);
    beside(f, "below");
    by("context-caption").textContent = `The line is the context that is asked for.${lines.size > shown.length ? ` Shown are the ${shown.length} configurations that come nearest to being the cheapest.` : ""}`;
    return show(f, by("context-picture"));
  }

  const NINE = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"]; // cividis

  function map(s) {
    const [low, high] = carried.covered, contexts = doublings(s), losses = lossSteps(low, high, s);
    const cells = [];
    for (const loss of losses) {
      const at = { ...asking.asked(s), loss }, sized = Numerics.sizesAt(point, at);
      for (const context of contexts) {
        const a = Numerics.answer(point, { ...at, context }, sized), { best } = a;
        cells.push({ loss: String(loss), context: contextText(context), t: context, l: loss, best, saving: 100 * best.saving[s.objective] });
      }
    }
    const savings = cells.filter((c) => c.best.reached).map((c) => c.saving).filter(Number.isFinite);
    const bottom = 10 * Math.floor(Math.min(...savings, 90) / 10), top = Math.max(bottom + 10, 10 * Math.ceil(Math.max(...savings, 0) / 10));
    const shade = (v) => (Number.isFinite(v) ? NINE[Math.min(9, Math.max(0, Math.floor((10 * (v - bottom)) / (top - bottom))))] : line());
    const base = baselineLabel(carried, s), kind = carried.objectives[s.objective], narrow = by("map-picture").clientWidth < 480;
    const short = new Map(carried.configurations.map((c, i) => [c.name, c.pattern ? `${c.n_heads},${c.n_kv_heads}${String.fromCharCode(97 + i)}` : `${c.n_heads},${c.n_kv_heads}`]));
    const f = figure({
      place: by("map-picture"), title: `Cheapest (heads, KV) by ${kind}`, x: "inference context (tokens)", y: "target loss (nats)", height: Math.max(110 + 27 * losses.length, innerWidth >= 1900 ? 560 : Math.min(320, tall(by("map-picture")))),
      x_range: new (Bokeh.Models.get("FactorRange"))({ factors: contexts.map(contextText) }),
      y_range: new (Bokeh.Models.get("FactorRange"))({ factors: losses.map(String) }),
    });
    const data = source({
      x: cells.map((c) => c.context), y: cells.map((c) => c.loss), fill: cells.map((c) => (c.best.reached ? shade(c.saving) : line())),
      text: cells.map((c) => (c.best.reached ? short.get(c.best.configuration.name) + (c.best.extrapolated ? "~" : "") : "none")),
      ink: cells.map((c) => (c.best.reached && c.saving > (bottom + top) / 2 ? "#000000" : c.best.reached && Number.isFinite(c.saving) ? "#ffffff" : ink())),
      name: cells.map((c) => (c.best.reached ? c.best.configuration.name : "none")), saved: cells.map((c) => (c.best.reached ? percent(c.saving / 100) : "-")),
      n: cells.map((c) => quantity(c.best.n)), 
    });
    const tiles = f.rect({ x: { field: "x" }, y: { field: "y" }, width: 1, height: 1, source: data, fill_color: { field: "fill" }, line_color: page(), line_width: 2 });
    f.text({ x: { field: "x" }, y: { field: "y" }, text: { field: "text" }, source: data, text_align: "center", text_baseline: "middle", text_font_size: narrow ? "8px" : "11px", text_color: { field: "ink" } });
    if (contexts.includes(s.context) && s.loss !== null)
      f.rect({ x: [contextText(s.context)], y: [String(s.loss)], width: 1, height: 1, fill_color: null, line_color: "#d55e00", line_width: 4 });
    f.add_tools(new (Bokeh.Models.get("HoverTool"))({ renderers: [tiles], tooltips: [["heads, KV", "@name"], ["N*", "@n"], [`saves of ${base}`, "@saved"], ["at", "@y nats, @x tokens"]] }));
    f.add_tools(new (Bokeh.Models.get("TapTool"))({ renderers: [tiles] }));
    tiles.nonselection_glyph = null;
    tiles.selection_glyph = null;
    data.selected.properties.indices.change.connect(() => {
      const [i] = data.selected.indices;
      if (i !== undefined) move({ loss: cells[i].l, context: cells[i].t });
    });
    for (const grid of f.center) if ("grid_line_color" in grid) grid.grid_line_color = null;
    if (narrow) for (const axis of f.below) if ("major_label_orientation" in axis) axis.major_label_orientation = 0.9;
    const codes = dense ? "" : " " + carried.configurations.filter((c) => c.pattern).map((c) => `${short.get(c.name)}: ${c.name}`).join("; ") + ".";
    by("map-caption").textContent = `Colour: ${kind} saved against ${base}, from ${bottom}% (dark) to ${top}% (bright). ~ its size lies outside the fitted ones. Click a tile to ask for it.${codes}`;
    return show(f, by("map-picture"));
  }

  /** Up to nine round losses over what the curves cover, the one that is asked for among them. */
  function lossSteps(low, high, s) {
    const raw = (high - low) / 8, unit = 10 ** Math.floor(Math.log10(raw)), digits = Math.max(0, -Math.floor(Math.log10(unit)));
    const step = [1, 2, 5, 10].map((k) => k * unit).find((v) => v >= raw), out = new Set();
    for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) out.add(Number(v.toFixed(digits)));
    if (s.loss !== null) out.add(s.loss);
    return [...out].filter((v) => v > 0).sort((a, b) => a - b);
  }

  return { cost, contexts, map, contextText };
}
