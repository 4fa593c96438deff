// The page: its folds, its controls, its address and its table. Text goes in as text, never as markup.

"use strict";

(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const by = (id) => document.getElementById(id);
  const { colour, dark, darkness, drawChart } = Drawing;
  const { fixed, quantity, percent, margin, span, told, goal, baselineLabel, standing, costText } = Words;
  const carried = read("carried"), charts = read("charts");
  const model = Numerics.prepare(carried), asking = Asking(carried, model);
  const { NUMBERS, everyone, opening, dense } = asking;
  const pictures = Pictures(carried, model, asking, move), { contextText } = pictures;
  const [lowLoss] = carried.limits.loss;
  const ZPOWERS = ["lambda", "alpha", "beta"]; // of Z; shown to four digits
  let state = { ...opening };

  /** Charts are drawn when their fold is opened, and again when colours change. */
  function drawFolded() {
    for (const place of document.querySelectorAll(".chart")) {
      const fold = place.closest("details");
      const draw = () => {
        if ((fold && !fold.open) || place.dataset.dark === String(dark())) return;
        place.dataset.dark = String(dark());
        drawChart(charts[place.dataset.chart], place).then(() => (place.dataset.drawn = "done"));
      };
      if (fold) fold.addEventListener("toggle", draw);
      darkness.addEventListener("change", draw);
      place.addEventListener("redraw", draw);
      draw();
    }
    window.addEventListener("beforeprint", () => {
      Drawing.print(true);
      for (const fold of document.querySelectorAll("details")) fold.open = true;
      redraw();
    });
    window.addEventListener("afterprint", () => (Drawing.print(false), redraw()));
  }

  const redraw = () => {
    for (const place of document.querySelectorAll(".chart")) place.dispatchEvent(new Event("redraw"));
    update();
  };

  /** The ranking as a table: what `frontier --ranking` prints. */
  function ranking(a, s) {
    const kind = s.objective, base = baselineLabel(carried, s);
    const far = Object.keys(a.untimed).length > 0; // beyond what was timed nothing is decided
    const seen = a.choices.some((c) => c.configuration.known !== "measured"), sparse = !dense;
    const columns = [
      ["heads, KV", (c) => c.configuration.name + (c.extrapolated && c.reached ? "~" : "")],
      ["", (c) => standing(a, c)],
      ...(seen ? [["known", (c) => c.configuration.known]] : []),
      ["N*", (c) => quantity(c.n)],
      ["N*, 90% interval", (c) => span(c.n_interval, quantity)],
      ["L x d", (c) => (Number.isFinite(c.n_layers) ? `${fixed(c.n_layers, 1)} x ${fixed(c.d_model, 0)}` : "-")],
      ...(sparse ? [["T_eff (tokens)", (c) => (c.reached ? told(Math.round(c.effective)) : "-")]] : []),
      ["memory (values)", (c) => quantity(c.memory)],
      ["FLOPs", (c) => quantity(c.flops)],
      ["Z", (c) => quantity(c.z)],
      ...(["bytes", "seconds", "dollars"].includes(kind) ? [[carried.objectives[kind], (c) => costText(kind, c.cost)]] : []),
      ["dearer by", (c) => percent(c.excess, 2)],
      [`saves of ${base}`, (c) => percent(c.saving[kind])],
      ["90% interval", (c) => span(c.saving_interval[kind], (v) => percent(v))],
      ["P(best)", (c) => (far ? "-" : percent(c.probability, 0))],
      [`within ${margin(s.indifference)}`, (c) => (far ? "-" : percent(c.within, 0))],
      ["regret", (c) => (far ? "-" : percent(c.regret, 2))],
    ];
    const table = document.createElement("table");
    table.className = "w1100";
    const head = table.createTHead().insertRow(), body = table.createTBody();
    for (const [name] of columns) {
      const cell = document.createElement("th");
      cell.textContent = name;
      head.append(cell);
    }
    for (const choice of a.choices) {
      const row = body.insertRow();
      if (choice === a.best && choice.reached) row.className = "best";
      columns.forEach(([name, write], i) => {
        const cell = row.insertCell();
        cell.dataset.label = name;
        cell.textContent = write(choice);
        if (i) return;
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = colour(choice.configuration.look.color);
        cell.prepend(swatch);
      });
    }
    const note = document.createElement("p");
    note.className = "quiet";
    note.textContent = `By ${carried.objectives[kind]} at ${goal(a)}, FLOPs ${s.convention}. ${carried.intervals}` +
      (carried.refits.carried < carried.refits.all ? `, of which this page carries ${told(carried.refits.carried)}: its last digits may differ` : "") +
      `. Cheapest, as good (within ${margin(s.indifference)} of it in 90% of the refits) and open (these runs do not tell) are tied. ~ outside the fitted sizes.`;
    by("ranking").replaceChildren(table, note);
  }

  // ------------------------------------------------------------------------------------- controls

  let later = 0, once = false, drawn = Promise.resolve();

  function fill(s) {
    for (const [name, rule] of Object.entries(NUMBERS)) {
      const value = s[name];
      if (document.activeElement !== by(name)) by(name).value = value === null ? "" : rule.percent ? Number((100 * value).toPrecision(12)) : ZPOWERS.includes(name) ? Number(value.toPrecision(4)) : value;
    }
    if (document.activeElement !== by("price")) by("price").value = s.price ?? (s.hardware ? carried.hardware[s.hardware].price : "");
    by("context-slide").value = Math.log2(s.context);
    if (s.loss !== null) by("loss-slide").value = s.loss;
    for (const name of ZPOWERS) by(`${name}-slide`).value = s[name];
    by("context-told").textContent = s.context >= 1024 && s.context % 1024 === 0 ? contextText(s.context) : "";
    for (const name of ["convention", "objective"]) by(name).value = s[name];
    by("hardware").value = s.hardware || "";
    const known = carried.baselines.some((b) => b.name === s.baseline);
    by("baseline").value = known ? s.baseline : "one";
    by("whole").hidden = known;
    if (!known && document.activeElement !== by("whole-text")) by("whole-text").value = s.baseline;
    document.querySelector(".of-z").hidden = s.objective !== "z";
    for (const box of by("candidates").querySelectorAll("input")) box.checked = s.candidates.includes(box.value);
    by("candidates-told").textContent = `(${s.candidates.length} of ${everyone.length})`;
  }

  /** Ask the question as it is now: at once what is read, a moment later what is looked at. */
  function update() {
    const [field, why] = asking.refusal(state);
    for (const input of by("controls").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    by("wrong").textContent = why;
    by("wrong").hidden = !why;
    if (why) {
      if (field) by(field)?.setAttribute("aria-invalid", "true");
      return;
    }
    fill(state);
    const a = Numerics.answer(model, asking.asked(state));
    window.gqaScalingAnswer = a; // for who wants the numbers in the console
    by("sentence").textContent = Words.sentence(carried, model, a, state);
    ranking(a, state);
    const [text, note] = asking.command(state);
    by("command").replaceChildren(...unbroken(text));
    by("command-note").textContent = note;
    const address = asking.toAddress(state);
    history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
    window.clearTimeout(later);
    const now = { ...state };
    later = window.setTimeout(() => {
      drawn = drawn.then(() => Promise.all([pictures.cost(a, now), pictures.contexts(now), pictures.map(now)]))
        .then(() => (document.body.dataset.drawn = address || "as it opens"));
    }, once ? 90 : 0);
    once = true;
  }

  function move(changes) {
    state = { ...state, ...changes };
    update();
  }

  function number(name, text) {
    const rule = NUMBERS[name];
    if (text.trim() === "") return null;
    return rule.percent ? Number(text) / 100 : Number(text);
  }

  function wire() {
    const [low, high] = carried.covered, digits = Math.max(1, Math.ceil(-Math.log10((high - low) / 60)));
    const wide = 0.25 * (high - low);
    Object.assign(by("loss-slide"), { min: Math.max(lowLoss, low - wide).toFixed(digits), max: (high + wide).toFixed(digits), step: 10 ** -digits });
    Object.assign(by("context-slide"), { min: 8, max: Math.max(21, Math.ceil(Math.log2(opening.context))), step: 1 });
    for (const { name, label } of carried.baselines) by("baseline").append(new Option(label, name));
    if (dense) by("baseline").append(new Option("one model ...", "one"));
    for (const [name, label] of Object.entries(carried.objectives)) by("objective").append(new Option(label, name));
    for (const name of Object.keys(carried.hardware)) by("hardware").append(new Option(name, name));
    for (const c of carried.configurations.filter((each) => each.ranked)) {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", value: c.name });
      label.append(box, c.name + (c.known === "measured" ? "" : " *"));
      label.title = c.known_words;
      by("candidates").append(label);
    }
    for (const name of Object.keys(NUMBERS)) by(name).addEventListener("input", (e) => move({ [name]: number(name, e.target.value) }));
    by("context-slide").addEventListener("input", (e) => move({ context: 2 ** Number(e.target.value) }));
    by("loss-slide").addEventListener("input", (e) => move({ loss: Number(e.target.value) }));
    for (const name of ZPOWERS) by(`${name}-slide`).addEventListener("input", (e) => move({ [name]: Number(e.target.value) }));
    for (const name of ["convention", "objective"]) by(name).addEventListener("change", (e) => move({ [name]: e.target.value }));
    by("hardware").addEventListener("change", (e) => move({ hardware: e.target.value || null, price: null }));
    by("baseline").addEventListener("change", (e) => {
      if (e.target.value !== "one") return move({ baseline: e.target.value });
      by("whole").hidden = false;
      by("whole-text").focus();
    });
    by("whole-text").addEventListener("change", (e) => move({ baseline: e.target.value.replace(/\s/g, "") }));
    by("candidates").addEventListener("change", () => {
      const boxes = [...by("candidates").querySelectorAll("input")];
      move({ candidates: boxes.filter((box) => box.checked).map((box) => box.value) });
    });
    by("all").addEventListener("click", () => move({ candidates: everyone }));
    by("measured").addEventListener("click", () => move({ candidates: carried.configurations.filter((c) => c.ranked && c.known === "measured").map((c) => c.name) }));
    by("reset").addEventListener("click", () => move({ ...opening }));
    by("copy").addEventListener("click", copy);
    by("controls").addEventListener("submit", (e) => e.preventDefault());
    window.addEventListener("hashchange", () => move(asking.fromAddress(location.hash.slice(1))));
    darkness.addEventListener("change", update);
  }

  /** The command, to be broken between its options alone. */
  function unbroken(text) {
    return text.split(/ (?=--)/).flatMap((part, i) => {
      const whole = document.createElement("span");
      whole.className = "option";
      whole.textContent = part;
      return i ? [" ", whole] : [whole];
    });
  }

  async function copy() {
    const text = by("command").textContent, button = by("copy");
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange(); // a page opened from disk may not be let at the clipboard
      range.selectNodeContents(by("command"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    window.setTimeout(() => (button.textContent = "Copy the command"), 1500);
  }

  drawFolded();
  wire();
  by("decide").hidden = by("ranked").hidden = false;
  by("ranked").open = window.innerWidth > 700;
  state = asking.fromAddress(location.hash.slice(1));
  if (asking.refusal(state)[1]) {
    const why = asking.refusal(state)[1];
    state = { ...opening };
    update();
    by("wrong").textContent = `This address was not taken: ${why}.`;
    by("wrong").hidden = false;
  } else update();
})();
