// How the page draws: Bokeh's figures in the page's colours, and the charts that no setting moves.

"use strict";

const Drawing = (() => {
  const { quantity } = Words;

  // ------------------------------------------------------------------------------------ light and dark

  const darkness = window.matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const dark = () => darkness.matches && !printing;
  const ink = () => (dark() ? "#e8e8e8" : "#1b1b1b");
  const quiet = () => (dark() ? "#a8adb3" : "#595959");
  const line = () => (dark() ? "#363c42" : "#e2e4e6");
  const page = () => (dark() ? "#15181b" : "#ffffff");
  const colour = (name) => (dark() ? { "#000000": "#e8e8e8", "#0072B2": "#3d9be0" }[name] || lifted(name) : name);

  /** A dark shade on a dark page: mixed with white, the more the darker it is. */
  function lifted(name) {
    const parts = [1, 3, 5].map((at) => parseInt(name.slice(at, at + 2), 16));
    const white = 0.8 * Math.max(0, 1 - Math.max(...parts) / 170);
    return `#${parts.map((v) => Math.round(v + white * (255 - v)).toString(16).padStart(2, "0")).join("")}`;
  }

  // ------------------------------------------------------------------------------------------ pictures

  const sizeOf = (marker) => ({ D: 12, "*": 13, P: 11, "^": 10, v: 10 })[marker] || 8;
  const MARKERS = { o: "circle", s: "square", "^": "triangle", D: "diamond", v: "inverted_triangle", P: "plus", X: "x", "*": "star" };
  const DASHES = { "-": "solid", "--": "dashed", "-.": "dotdash", ":": "dotted" };
  const dash = (style) => DASHES[style] || (Array.isArray(style) ? style[1].map((v) => 3 * v) : "solid");

  /** Words in lines of at most so many letters. */
  function wrapped(text, letters) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines.length - 1, longer = lines[last] ? `${lines[last]} ${word}` : word;
      if (lines[last] && longer.length > Math.max(letters, 12)) lines.push(word);
      else lines[last] = longer;
    }
    return lines.join("\n");
  }

  /** An empty figure in the page's colours for this place; `more` are Bokeh's own properties. */
  function figure({ place, title, x, y, height, ...more }) {
    const f = Bokeh.Plotting.figure({
      title: wrapped(title, (place.clientWidth - 150) / 7), height, x_axis_label: x, y_axis_label: y, sizing_mode: "stretch_width", output_backend: "svg",
      tools: "pan,box_zoom,wheel_zoom,reset,save", toolbar_location: "above", min_border_right: 14, ...more,
    });
    f.toolbar.logo = null;
    f.background_fill_color = f.border_fill_color = page();
    f.outline_line_color = null;
    f.title.text_color = ink();
    f.title.text_font_size = "13px";
    for (const axis of [...f.below, ...f.left]) {
      if (!("major_label_text_color" in axis)) continue;
      axis.axis_label_text_font_style = "normal";
      axis.axis_label_text_color = axis.major_label_text_color = quiet();
      axis.axis_line_color = axis.major_tick_line_color = quiet();
      axis.minor_tick_line_color = null;
    }
    for (const grid of f.center) if ("grid_line_color" in grid) grid.grid_line_color = line();
    return f;
  }


  /** An axis with labels at these places and no others. */
  function readable(axis, places, text) {
    axis.ticker = new (Bokeh.Models.get("FixedTicker"))({ ticks: places });
    axis.major_label_overrides = new Map(places.map((v) => [v, text(v)]));
  }

  /** Round places on a logarithmic axis: at 1, 2 and 5 where they are enough, else closer. */
  function steps(low, high) {
    for (const each of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
      const out = [];
      for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++)
        out.push(...each.map((s) => s * 10 ** d).filter((v) => v >= low && v <= high));
      if (out.length >= 3) return out.filter((_, i) => i % Math.ceil(out.length / 7) === 0);
    }
    return [0, 1, 2, 3].map((i) => Number((low + ((high - low) * (i + 0.5)) / 4).toPrecision(2)));
  }

  const shortly = (v) => quantity(v).replace(/(\.\d*?)0+(\D*)$/, "$1$2").replace(/\.(\D*)$/, "$1");

  const views = new Map(); // what stands in each place

  /** Let go of a picture that another one replaces, with its document. */
  function forget(view) {
    if (!view) return;
    const { document } = view.model;
    view.remove();
    document?.clear();
    Bokeh.documents.splice(0, Bokeh.documents.length, ...Bokeh.documents.filter((each) => each !== document));
  }

  /** Draw a figure in this place, instead of what is there. */
  async function show(f, place) {
    forget(views.get(place));
    place.replaceChildren();
    const view = await Bokeh.Plotting.show(f, place);
    await new Promise((done) => window.setTimeout(done)); // a legend beside a picture has its size only now
    view.invalidate_layout();
    views.set(place, view);
  }

  const legible = (f) => {
    const l = f.legend;
    l.background_fill_color = page();
    l.background_fill_alpha = 0.75;
    l.border_line_color = null;
    l.label_text_color = ink();
    l.label_text_font_size = "11px";
    l.click_policy = "hide";
    l.spacing = 10;
    l.label_standoff = 2;
    l.padding = 4;
    l.glyph_height = 16;
    l.margin = 4;
  };

  /** Move the legend out of the picture, to this side of it. */
  function beside(f, side) {
    const { legend } = f;
    f.center = f.center.filter((each) => each !== legend);
    f.add_layout(legend, side);
  }

  const source = (data) => new Bokeh.ColumnDataSource({ data });

  /** A chart that no setting moves: lines, bands and points by configuration (charts.py). */
  function drawChart(chart, place) {
    const { title, x, y } = chart;
    const f = figure({ place, title, x, y, height: 400, x_axis_type: chart.log_x ? "log" : "linear" });
    const named = new Set();
    const legend = (name) => (named.has(name) ? {} : (named.add(name), { legend_label: name }));
    const ends = [];
    for (const s of chart.series) {
      const c = colour(s.color);
      if (s.line) {
        const data = source({ ...s.line, name: s.line.x.map(() => s.name), run: s.line.x.map(() => (s.run || [s.name])[0]) });
        if (s.line.low) f.varea({ x: { field: "x" }, y1: { field: "low" }, y2: { field: "high" }, source: data, fill_color: c, fill_alpha: 0.13 });
        f.line({ x: { field: "x" }, y: { field: "y" }, source: data, line_color: c, line_width: chart.thin ? 1 : 1.8, line_alpha: chart.thin ? 0.75 : 1, line_dash: dash(s.linestyle), name: "line", ...legend(s.name) });
        ends.push(...s.line.x);
      }
      if (s.points) {
        const p = s.points, data = source({
          ...p, name: p.x.map(() => s.name), label: p.run.map((r) => r[0]), size: p.run.map((r) => r[1]),
          seed: p.run.map((r) => r[2]), command: p.run.map((r) => r[3]),
        });
        if (p.low) f.segment({ x0: { field: "x" }, x1: { field: "x" }, y0: { field: "low" }, y1: { field: "high" }, source: data, line_color: c, line_alpha: 0.5 });
        f.scatter({ x: { field: "x" }, y: { field: "y" }, source: data, marker: MARKERS[s.marker], size: sizeOf(s.marker), fill_color: c, line_color: page(), name: "points", ...legend(s.name) });
        ends.push(...p.x);
      }
    }
    const hover = Bokeh.Models.get("HoverTool");
    const points = f.renderers.filter((r) => r.name === "points"), lines = f.renderers.filter((r) => r.name === "line");
    const shown = { points: [["run", "@label"], ["heads, KV", "@name"], ["size", "@size"], ["loss", "@y{0.0000}"], ["seed", "@seed"], ["command", "@command"]], line: [["run", "@run"], ["heads, KV", "@name"], ["at", "@x{0.00a}"], ["loss", "@y{0.0000}"]] };
    if (points.length) f.add_tools(new hover({ renderers: points, tooltips: chart.zero ? [["run", "@label"], ["heads, KV", "@name"], ["", "@size"], ["millinats", "@y{0.0}"]] : shown.points }));
    else f.add_tools(new hover({ renderers: lines, tooltips: shown.line }));
    if (chart.zero) f.add_layout(new (Bokeh.Models.get("Span"))({ location: 0, dimension: "width", line_color: quiet(), line_width: 1 }));
    if (chart.log_x && ends.length) {
      const axis = f.below.find((a) => "ticker" in a);
      const [low, high] = [ends.reduce((a, b) => Math.min(a, b)), ends.reduce((a, b) => Math.max(a, b))];
      readable(axis, steps(low / 1.05, high * 1.05), shortly);
    }
    legible(f);
    const wide = Math.max(...[...named].map((n) => n.length)) * 7 + 44; // pixels of an entry
    const columns = Math.max(1, Math.floor((place.clientWidth - 80) / wide));
    if (named.size > 8 || columns < 8) {
      f.legend.ncols = Math.min(columns, named.size);
      f.legend.orientation = "horizontal";
      f.height += 24 * Math.ceil(named.size / columns);
      beside(f, "below");
    } else beside(f, "right");
    return show(f, place);
  }

  return { darkness, print: (now) => (printing = now), dark, ink, quiet, line, page, colour, MARKERS, sizeOf, dash, figure, readable, shortly, show, legible, beside, source, drawChart };
})();
