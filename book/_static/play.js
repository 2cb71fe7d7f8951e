/* Figures to play with. Each takes the place of a still picture on the screen; without this script the picture stays.

   A cell of the chapter computes the numbers and leaves them in the page as JSON (ewc_plots/interactive.py). The first
   part below repeats the package's formulas for the values that a reader chooses, needs no page, and is tested against
   the package (tests/test_play.py); the second draws; the third holds the figures. */
(() => {
  "use strict";

  /* ---------------------------------------------------------------- formulas */

  /* Mean negative log likelihood, nats, of a logistic regression through the origin; signed: label times input. */
  function logisticLoss(signed, w) {
    let sum = 0;
    for (const [x, y] of signed) {
      const margin = x * w[0] + y * w[1];
      sum += Math.max(-margin, 0) + Math.log1p(Math.exp(-Math.abs(margin)));
    }
    return sum / signed.length;
  }

  /* Descent on  L_B(w) + strength / (2 n) (w - anchor)^T precision (w - anchor)  from the anchor, as in plane.py. */
  function descend(signed, anchor, precision, strength, steps = 100000) {
    const n = signed.length, [[a, b], [, d]] = precision;
    const stiffest = (strength / n) * ((a + d) / 2 + Math.hypot((a - d) / 2, b));
    const rate = Math.min(0.5, 0.5 / stiffest); // less than half a step only where the spring would overshoot
    const path = [anchor];
    for (let step = 0, w = anchor; step < steps; step++) {
      const u = w[0] - anchor[0], v = w[1] - anchor[1];
      let g = strength * (a * u + b * v), h = strength * (b * u + d * v);
      for (const [x, y] of signed) {
        const p = 1 / (1 + Math.exp(x * w[0] + y * w[1]));
        g -= p * x;
        h -= p * y;
      }
      w = [w[0] - (rate * g) / n, w[1] - (rate * h) / n];
      path.push(w);
      if (Math.hypot(g, h) / n < 1e-7) break;
    }
    return path;
  }

  /* Stirling's series, far enough to the right for it to be exact in double precision. */
  function logGamma(x) {
    let shift = 0;
    for (; x < 12; x++) shift -= Math.log(x);
    const series = 1 / (12 * x) - 1 / (360 * x ** 3) + 1 / (1260 * x ** 5) - 1 / (1680 * x ** 7);
    return shift + (x - 0.5) * Math.log(x) - x + 0.5 * Math.log(2 * Math.PI) + series;
  }

  const logBeta = (a, b) => logGamma(a) + logGamma(b) - logGamma(a + b);
  const softplus = (z) => Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z)));

  /* Energies of the Beta posterior in its two coordinates, and Laplace's Gaussian there: null without an inner mode. */
  const BETA = {
    theta: {
      energy: (a, b, t) => (t > 0 && t < 1 ? -(a - 1) * Math.log(t) - (b - 1) * Math.log1p(-t) : Infinity),
      laplace: (a, b) =>
        a > 1 && b > 1 ? { mode: (a - 1) / (a + b - 2), precision: (a + b - 2) ** 3 / ((a - 1) * (b - 1)) } : null,
    },
    logit: {
      energy: (a, b, z) => a * softplus(-z) + b * softplus(z),
      laplace: (a, b) => ({ mode: Math.log(a / b), precision: (a * b) / (a + b) }),
    },
  };

  const bell = (x, { mean, precision }) =>
    Math.sqrt(precision / (2 * Math.PI)) * Math.exp(-0.5 * precision * (x - mean) ** 2);

  /* Total variation distance to the Gaussian: one minus the area under the lower of the two densities. */
  function distance(a, b, coordinate) {
    const found = BETA[coordinate].laplace(a, b);
    if (!found) return null;
    const wide = 12 / Math.sqrt(found.precision), cells = 8000;
    const low = coordinate === "theta" ? Math.max(0, found.mode - wide) : found.mode - wide;
    const high = coordinate === "theta" ? Math.min(1, found.mode + wide) : found.mode + wide;
    const logZ = logBeta(a, b), width = (high - low) / cells;
    let shared = 0;
    for (let i = 0; i < cells; i++) {
      const x = low + (i + 0.5) * width;
      const exact = Math.exp(-BETA[coordinate].energy(a, b, x) - logZ);
      shared += Math.min(exact, bell(x, { mean: found.mode, precision: found.precision })) * width;
    }
    return 1 - shared;
  }

  /* A Gaussian belief after n observations with this mean: precisions add, means average by precision. */
  function condition(belief, task, sigma) {
    const stiffness = task.n / sigma ** 2, precision = belief.precision + stiffness;
    return { mean: (belief.precision * belief.mean + stiffness * task.mean) / precision, precision };
  }

  globalThis.ewcPlay = { logisticLoss, descend, logGamma, BETA, distance, condition };
  if (typeof document === "undefined") return;

  /* ---------------------------------------------------------------- drawing */

  let count = 0;
  const unique = () => `ewc-play-${++count}`;

  function make(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null));
    return node;
  }
  const html = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
  const short = (value) => Number(value.toPrecision(3)).toString().replace("-", "−");
  const range = (low, high, points) => Array.from({ length: points }, (_, i) => low + ((high - low) * i) / (points - 1));

  /* Markers as in the still pictures, around the origin. */
  const MARKERS = {
    circle: "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z",
    square: "M-4.5-4.5H4.5V4.5H-4.5Z",
    diamond: "M0-6L6 0L0 6L-6 0Z",
    triangle: "M0-6L5.6 4.4H-5.6Z",
  };
  const marker = (shape, colour, x, y) =>
    svg("path", { d: MARKERS[shape], transform: `translate(${x} ${y})`, class: `marker ${colour}` });
  const swatch = (look) =>
    svg("svg", { class: "swatch", viewBox: "0 0 30 14", width: 30, height: 14, "aria-hidden": "true" },
      svg("path", { d: "M0 7H30", class: `line ${look.colour} ${look.dash}` }),
      look.marker ? marker(look.marker, look.colour, 15, 7) : null);

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
  }
  const powers = (low, high) =>
    range(Math.ceil(Math.log10(low)), Math.floor(Math.log10(high)), 1 + Math.floor(Math.log10(high)) - Math.ceil(Math.log10(low)))
      .map((power) => 10 ** power);

  /* Axes in a drawing of fixed size, which the page scales. `draw` renews what it shows. */
  class Panel {
    constructor(says, { x, y, title, xlabel, ylabel = null, height = 250, log = false, yTicks = null }) {
      Object.assign(this, { x, y, title, xlabel, ylabel, log, yTicks, height, box: [ylabel ? 48 : 42, 26, 342, height - 40] });
      this.node = svg("svg", { viewBox: `0 0 360 ${height}`, role: "img", "aria-label": says, class: "panel" });
    }
    at(axis, value) {
      const [low, high] = this[axis], of = this.log ? Math.log : (v) => v;
      const share = (of(value) - of(low)) / (of(high) - of(low));
      const [left, top, right, bottom] = this.box;
      return axis === "x" ? (right - left) * share : (bottom - top) * (1 - share);
    }
    place(point) {
      return `${this.at("x", point[0]).toFixed(1)} ${Math.max(-999, Math.min(999, this.at("y", point[1]))).toFixed(1)}`;
    }
    line(points, look, more = "") {
      // of the thousands of steps in which a descent comes to rest, most end where the one before did
      const places = points.map((point) => this.place(point)).filter((place, i, all) => place !== all[i - 1]);
      return svg("path", { d: "M" + places.join("L"), class: `line ${look} ${more}` });
    }
    fill(points, look) {
      return svg("path", { d: "M" + points.map((point) => this.place(point)).join("L") + "Z", class: `fill ${look}` });
    }
    mark(point, shape, colour) {
      return marker(shape, colour, this.at("x", point[0]), this.at("y", point[1]));
    }
    label(point, words, dx = 0, dy = -10, anchor = "middle") {
      const x = this.at("x", point[0]) + dx, y = this.at("y", point[1]) + dy;
      return svg("text", { x, y, class: "halo", "text-anchor": anchor }, words);
    }
    draw(...content) {
      const [left, top, right, bottom] = this.box;
      const xs = this.log ? powers(...this.x) : ticks(...this.x, 6);
      const ys = this.yTicks ?? (this.log ? powers(...this.y) : ticks(...this.y, 5)).map((value) => [value, short(value)]);
      this.node.replaceChildren(
        svg("text", { x: left, y: 16, class: "title" }, this.title),
        ...xs.map((value) => {
          const x = left + this.at("x", value);
          return svg("g", {}, svg("path", { d: `M${x} ${top}V${bottom}`, class: "grid" }),
            svg("text", { x, y: bottom + 16, "text-anchor": "middle" }, short(value)));
        }),
        ...ys.map(([value, words]) => {
          const y = top + this.at("y", value);
          return svg("g", {}, svg("path", { d: `M${left} ${y}H${right}`, class: "grid" }),
            svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, words));
        }),
        svg("text", { x: (left + right) / 2, y: this.height - 6, "text-anchor": "middle" }, this.xlabel),
        this.ylabel ? svg("text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, this.ylabel) : "",
        svg("svg", { x: left, y: top, width: right - left, height: bottom - top }, ...content),
        svg("path", { d: `M${left} ${top}V${bottom}H${right}`, class: "axis" }),
      );
    }
  }

  /* ---------------------------------------------------------------- controls */

  function slider(name, { min, max, step = 1, value, words }, changed) {
    const id = unique(), shown = html("span", { class: "value", "aria-hidden": "true" });
    const input = html("input", { id, type: "range", min, max, step, value, oninput: () => { tell(); changed(Number(input.value)); } });
    const tell = () => {
      shown.textContent = words(Number(input.value));
      input.setAttribute("aria-valuetext", words(Number(input.value)));
    };
    tell();
    const set = (next) => { input.value = next; tell(); };
    return { node: html("div", { class: "slider" }, html("label", { for: id }, ...name), shown, input), set };
  }

  function choices(legend, type, options, changed) {
    const group = unique();
    const entries = options.map(({ value, words, checked, look }) =>
      html("label", {},
        html("input", { type, name: group, value, checked: checked ? "" : null, onchange: (event) => changed(value, event.target.checked) }),
        look ? swatch(look) : null, html("span", {}, words)));
    return html("fieldset", { class: "choices" }, html("legend", {}, legend), ...entries);
  }

  const button = (words, onclick) => html("button", { type: "button", onclick }, words);

  function table(caption, titles, rows) {
    const body = html("tbody", {}, ...rows.map((name) =>
      html("tr", {}, html("th", { scope: "row" }, name), ...titles.slice(1).map(() => html("td")))));
    const head = html("tr", {}, ...titles.map((title) => html("th", { scope: "col" }, title)));
    const node = html("table", {}, html("caption", {}, caption), html("thead", {}, head), body);
    const set = (row, values, state = "") => {
      const [name, ...cells] = body.rows[row].children;
      body.rows[row].className = state;
      values.forEach((value, i) => { cells[i].textContent = value; });
      return name;
    };
    return { node, set };
  }

  /* What a screen reader says once the reader has stopped moving a control. */
  function reporter() {
    const node = html("p", { class: "unseen", "aria-live": "polite" });
    let waiting = 0;
    const say = (words) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { node.textContent = words; }, 900);
    };
    return { node, say };
  }

  const key = (...entries) =>
    html("p", { class: "key", "aria-hidden": "true" }, ...entries.map(([look, words]) => html("span", {}, swatch(look), words)));
  const sub = (letter, index) => [html("i", {}, letter), html("sub", {}, index)];
  const EXACT = { colour: "blue", dash: "solid" };
  const GAUSSIAN = { colour: "vermilion", dash: "dashed" };

  /* ---------------------------------------------------------------- figures */

  const METHODS = {
    plain: { words: "plain", colour: "vermilion", dash: "dotted", marker: "circle" },
    L2: { words: "L2", colour: "green", dash: "dashed", marker: "square" },
    EWC: { words: "EWC, diagonal", colour: "blue", dash: "solid", marker: "diamond" },
    "EWC, full": { words: "EWC, full", colour: "purple", dash: "dashdot", marker: "triangle" },
  };

  function strength(data) {
    const names = Object.keys(METHODS), shown = new Set(names), [start] = data.modes, n = data.signed[1].length;
    const [[a, b], [, d]] = data.precision;
    const precisions = {
      plain: [[0, 0], [0, 0]],
      L2: [[n, 0], [0, n]],
      EWC: [[a, 0], [0, d]],
      "EWC, full": [[a, b], [b, d]],
    };
    const lowest = data.signed.map((signed, task) => logisticLoss(signed, data.modes[task]));
    const together = (name) => data.regret[name].map(([onA, onB]) => onA + onB);
    const nearest = (value) => data.strengths.reduce((best, s, i) =>
      Math.abs(Math.log(s / value)) < Math.abs(Math.log(data.strengths[best] / value)) ? i : best, 0);
    const lowestOf = (name) => together(name).indexOf(Math.min(...together(name)));
    let chosen = nearest(1);

    const known = new Map();
    function walk(name) {
      const value = name === "plain" ? 0 : data.strengths[chosen], label = `${name} ${value}`;
      if (!known.has(label)) {
        const path = descend(data.signed[1], start, precisions[name], value), end = path.at(-1);
        known.set(label, { path, regret: data.signed.map((signed, task) => logisticLoss(signed, end) - lowest[task]) });
      }
      return known.get(label);
    }

    const map = new Panel("The plane of the two parameters: low-loss regions of tasks A and B, and the path of each method "
      + "from the optimum of A. The table gives what each pays.",
      { x: data.axes[0], y: data.axes[1], title: "paths from A’s optimum", xlabel: "parameter w₁", ylabel: "parameter w₂", height: 360 });
    const sums = Object.keys(data.regret).flatMap(together).concat(data.plain[0] + data.plain[1]);
    const chart = new Panel("What tasks A and B pay together against the strength, a curve a method, with the chosen strength.",
      { x: [data.strengths[0], data.strengths.at(-1)], y: [0.7 * Math.min(...sums), 1.6 * Math.max(...sums)], log: true,
        title: "A and B together, nats above lowest", xlabel: "strength λ", height: 360 });
    const land = ["sky", "orange"].flatMap((colour, task) => [
      ...data.regions[task].map((outline) => map.fill(outline, colour)),
      ...data.levels[task].flatMap((lines, i) => lines.map((line) => map.line(line, colour, i ? "thin" : ""))),
    ]);
    // A's valley leaves the map at its top, and B's optimum lies far inside of its own
    const brink = data.regions[0].flat().filter(([, y]) => y > data.axes[1][1] - 0.3).map(([x]) => x);
    const places = [
      map.label([(Math.min(...brink) + Math.max(...brink)) / 2, data.axes[1][1]], "low loss of A", 0, 18),
      map.label(data.modes[1], "low loss of B", 0, 19),
      ...data.modes.map((mode) => map.mark(mode, "circle", "black")),
      map.label(data.modes[0], "optimum of A", 0, -10),
      map.label(data.modes[1], "optimum of B", 0, -10),
    ];
    const curves = Object.fromEntries(Object.keys(data.regret).map((name) =>
      [name, together(name).map((sum, i) => [data.strengths[i], sum])]));
    curves.plain = data.strengths.map((s) => [s, data.plain[0] + data.plain[1]]);

    const report = reporter();
    const readout = table("Nats above the lowest loss at the path’s end", ["method", "task A", "task B", "sum"],
      names.map((name) => html("span", {}, swatch(METHODS[name]), METHODS[name].words)));
    function update(speak = true) {
      const drawn = names.filter((name) => shown.has(name)), look = (name) => `${METHODS[name].colour} ${METHODS[name].dash}`;
      map.draw(...land,
        ...drawn.map((name) => map.line(walk(name).path, look(name), name === "L2" ? "wide" : "")), ...places,
        ...drawn.map((name) => map.mark(walk(name).path.at(-1), METHODS[name].marker, METHODS[name].colour)));
      chart.draw(
        chart.line([[data.strengths[chosen], chart.y[0]], [data.strengths[chosen], chart.y[1]]], "grey", "thick"),
        ...drawn.map((name) => chart.line(curves[name], look(name))),
        ...drawn.map((name) => chart.mark([data.strengths[chosen], walk(name).regret[0] + walk(name).regret[1]],
          METHODS[name].marker, METHODS[name].colour)));
      names.forEach((name, row) => {
        const [onA, onB] = shown.has(name) ? walk(name).regret : [];
        readout.set(row, shown.has(name) ? [onA, onB, onA + onB].map((v) => number(v, 3)) : ["–", "–", "–"], shown.has(name) ? "" : "off");
      });
      if (speak) {
        report.say(`Strength ${short(data.strengths[chosen])}. Together above lowest, in nats: `
          + drawn.map((name) => `${METHODS[name].words} ${number(walk(name).regret[0] + walk(name).regret[1], 3)}`).join("; "));
      }
    }
    const knob = slider([html("b", {}, "strength λ")],
      { min: 0, max: data.strengths.length - 1, value: chosen, words: (i) => `λ = ${short(data.strengths[i])}` },
      (i) => { chosen = i; update(); });
    const go = (i) => () => { chosen = i; knob.set(i); update(); };
    const switches = choices("show", "checkbox",
      names.map((name) => ({ value: name, words: METHODS[name].words, checked: true, look: METHODS[name] })),
      (name, on) => { shown[on ? "add" : "delete"](name); update(); });
    update(false);
    return [
      html("div", { class: "controls" }, knob.node,
        html("div", { class: "buttons" }, button("λ = 1", go(nearest(1))), button("best L2", go(lowestOf("L2"))),
          button("best EWC, full", go(lowestOf("EWC, full"))))),
      switches, html("div", { class: "panels" }, map.node, chart.node), readout.node, report.node,
    ];
  }

  function coin(data) {
    const state = { heads: data.heads, tails: data.tails, prior: 0, coordinate: "theta" };
    const titles = { theta: "probability of heads θ", logit: "logit z = log(θ / (1 − θ))" };
    const window = { theta: [-0.2, 1.2], logit: [-8, 8] };
    const above = new Panel("Energy of the posterior above its minimum, in nats, with the parabola that touches it there.",
      { x: window.theta, y: [0, 8], title: "energy above its minimum, nats", xlabel: "" });
    const below = new Panel("Density of the posterior and Laplace’s Gaussian.", { x: window.theta, y: [0, 1], title: "density", xlabel: "" });
    const message = html("p", { class: "message" }), report = reporter();
    const readout = table("Laplace in the two coordinates", ["coordinate", "mode", "precision Λ", "total variation"],
      ["in θ", "in z"]);

    function edge(a, b) {
      if (a === 1 && b === 1) return "The density is level: no value of θ is more probable than another, and there is no mode to expand at.";
      if (a < 1 && b < 1) return "The density grows without bound towards both edges; its one inner flat place is its lowest.";
      if (a <= 1) return a < 1 ? "The density grows without bound towards the edge θ = 0: there is no mode inside."
        : "The density is highest at the edge θ = 0, where its slope does not vanish: there is no mode inside.";
      return b < 1 ? "The density grows without bound towards the edge θ = 1: there is no mode inside."
        : "The density is highest at the edge θ = 1, where its slope does not vanish: there is no mode inside.";
    }
    function update(speak = true) {
      const prior = data.priors[state.prior], a = prior.a + state.heads, b = prior.b + state.tails;
      const { energy, laplace } = BETA[state.coordinate], found = laplace(a, b), logZ = logBeta(a, b);
      const inTheta = state.coordinate === "theta";
      above.x = below.x = window[state.coordinate];
      above.xlabel = below.xlabel = titles[state.coordinate];
      const xs = inTheta ? range(0.002, 0.998, 499) : range(...window.logit, 500);
      const energies = xs.map((x) => energy(a, b, x));
      const least = found ? energy(a, b, found.mode) : Math.min(...energies);
      const exact = xs.map((x, i) => [x, Math.exp(-energies[i] - logZ)]);
      const line = range(...below.x, 400);
      const gaussian = found ? line.map((x) => [x, bell(x, { mean: found.mode, precision: found.precision })]) : [];
      const inside = exact.slice(8, -8).concat(gaussian).map(([, density]) => density);
      below.y = [0, 1.12 * Math.max(...inside)];
      const walls = (panel) => inTheta ? [[panel.x[0], 0], [1, panel.x[1]]].map(([from, to]) =>
        panel.fill([[from, panel.y[0]], [to, panel.y[0]], [to, panel.y[1]], [from, panel.y[1]]], "outside")) : [];
      above.draw(...walls(above), above.line(xs.map((x, i) => [x, energies[i] - least]), "blue solid"),
        found ? above.line(line.map((x) => [x, 0.5 * found.precision * (x - found.mode) ** 2]), "vermilion dashed") : "");
      below.draw(...walls(below), below.fill([[xs[0], 0], ...exact, [xs.at(-1), 0]], "blue"), below.line(exact, "blue solid"),
        found ? below.line(gaussian, "vermilion dashed") : "");
      for (const [row, coordinate] of ["theta", "logit"].entries()) {
        const there = BETA[coordinate].laplace(a, b);
        readout.set(row, there ? [number(there.mode), number(there.precision), number(distance(a, b, coordinate), 3)]
          : ["none", "–", "–"], coordinate === state.coordinate ? "current" : "");
      }
      const posterior = `Posterior Beta(${short(a)}, ${short(b)}). `;
      const apart = distance(a, b, state.coordinate);
      message.textContent = posterior + (found
        ? `In ${inTheta ? "θ" : "the logit"}, Laplace’s Gaussian is off by ${number(apart, 3)} in total variation.`
        : `${edge(a, b)} Laplace has nothing to offer in θ; in the logit it has.`);
      if (speak) report.say(message.textContent);
    }
    const tosses = (name) => slider([name], { min: 0, max: data.most, value: state[name], words: (v) => String(v) },
      (v) => { state[name] = v; update(); }).node;
    const prior = choices("prior", "radio", data.priors.map(({ name }, i) => ({ value: i, words: name, checked: i === 0 })),
      (i) => { state.prior = i; update(); });
    const coordinate = choices("coordinate", "radio",
      [{ value: "theta", words: "θ, the probability", checked: true }, { value: "logit", words: "z, the logit" }],
      (value) => { state.coordinate = value; update(); });
    update(false);
    return [
      html("div", { class: "controls pair" }, tosses("heads"), tosses("tails")), coordinate, prior, message,
      key([EXACT, "exact"], [GAUSSIAN, "Laplace"]), html("div", { class: "panels" }, below.node, above.node), readout.node, report.node,
    ];
  }

  function mean(data) {
    const tasks = data.tasks.map((task) => ({ ...task })), colours = ["sky", "orange", "green"];
    let order = tasks.map((_, i) => i), step = 0, moving = 0;
    const orders = permutations(order);
    const beliefs = () => order.reduce((list, i) => [...list, condition(list.at(-1), tasks[i], data.sigma)], [data.prior]);
    const names = () => order.map((i) => tasks[i].name);
    const densities = new Panel("Densities over θ: the belief before the task, the task alone, the belief after it, and the belief "
      + "from all tasks at once.", { x: [-4.5, 4.5], y: [0, 1], title: "density", xlabel: "θ" });
    const bars = new Panel("Precision after each step, as a bar made of the parts that the prior and the tasks contributed.",
      { x: [0, 8], y: [0, 4], title: "precision Λ adds up", xlabel: "precision Λ" });
    const report = reporter(), message = html("p", { class: "message" });
    const readout = table("The belief", ["seen", "precision Λ", "mean μ", "1 / √Λ"], ["nothing", "", "", "", "all at once"]);
    const bellLine = (belief) => range(-4.5, 4.5, 361).map((x) => [x, bell(x, belief)]);
    const alone = (task) => ({ mean: task.mean, precision: task.n / data.sigma ** 2 });
    const row = ({ precision, mean }) => [number(precision), number(mean), number(1 / Math.sqrt(precision))];

    function draw(now) {
      const list = beliefs(), final = list.at(-1), task = step ? tasks[order[step - 1]] : null;
      const peak = Math.max(...[final, ...tasks.map(alone)].map((one) => Math.sqrt(one.precision / (2 * Math.PI))));
      densities.y = [0, Math.ceil(2.2 * peak) / 2];
      densities.draw(
        task ? densities.line(bellLine(list[step - 1]), "grey dotted") : "",
        task && task.n ? densities.line(bellLine(alone(task)), "orange dashed") : "",
        densities.fill([[-4.5, 0], ...bellLine(now), [4.5, 0]], "blue"), densities.line(bellLine(now), "blue solid"),
        densities.line(bellLine(final), "black dashdot", "thin"));
      bars.x = [0, [4, 8, 16, 32].find((most) => most >= final.precision) ?? Math.ceil(final.precision)];
      bars.yTicks = ["prior", ...names().map((name) => `+ ${name}`)].map((words, i) => [3.5 - i, words]);
      bars.draw(...list.flatMap((_, i) => {
        const parts = [["prior", "grey", 0, data.prior.precision],
          ...order.slice(0, i).map((t, j) => [tasks[t].name, colours[t], list[j].precision, list[j + 1].precision])];
        return parts.flatMap(([name, colour, from, to]) => {
          const corners = [[from, 3.85 - i], [to, 3.85 - i], [to, 3.15 - i], [from, 3.15 - i]];
          const room = bars.at("x", to) - bars.at("x", from) > 9 * name.length;
          // What is to come is pale; its name is not, or nobody could read it.
          return [svg("g", {}, bars.fill(corners, `part ${colour}${i > step ? " later" : ""}`),
            room ? bars.label([(from + to) / 2, 3.5 - i], name, 0, 4) : "")];
        });
      }));
    }
    function update(from = null, speak = true) {
      const list = beliefs();
      list.forEach((belief, i) => {
        readout.set(i, i > step ? ["…", "…", "…"] : row(belief), i === step ? "current" : i > step ? "off" : "").textContent =
          i ? names().slice(0, i).join(", ") : "nothing";
      });
      readout.set(4, row(list.at(-1)));
      const name = names()[step - 1];
      message.textContent = step === 0 ? `Order ${names().join(", ")}. Nothing seen yet: the belief is the prior.`
        : `Order ${names().join(", ")}. Task ${name} added ${short(list[step].precision - list[step - 1].precision)} to the precision and moved the mean `
          + `from ${number(list[step - 1].mean)} to ${number(list[step].mean)}.${step === 3 ? " All tasks seen: as from all at once." : ""}`;
      next.setAttribute("aria-disabled", step === 3); // not `disabled`, which would lose the keyboard's place
      next.textContent = step === 3 ? "all tasks seen" : `learn task ${names()[step]}`;
      back.setAttribute("aria-disabled", step === 0);
      if (speak) report.say(message.textContent);
      cancelAnimationFrame(moving);
      if (from === null || matchMedia("(prefers-reduced-motion: reduce)").matches) return draw(list[step]);
      const began = performance.now();
      const frame = (time) => {
        const t = Math.min(1, Math.max(0, (time - began) / 450)), mix = (one, two) => one + (two - one) * t * (2 - t);
        draw({ mean: mix(from.mean, list[step].mean), precision: mix(from.precision, list[step].precision) });
        if (t < 1) moving = requestAnimationFrame(frame);
      };
      moving = requestAnimationFrame(frame);
    }
    const move = (by) => () => {
      if (step + by < 0 || step + by > 3) return;
      const from = beliefs()[step];
      step += by;
      update(from);
    };
    const next = button("", move(1)), back = button("back", move(-1));
    const swap = button("another order", () => {
      const from = beliefs()[step], at = orders.findIndex((one) => one.join() === order.join());
      order = orders[(at + 1) % orders.length];
      update(from);
    });
    const sliders = tasks.map((task) => html("fieldset", { class: "task" }, html("legend", {}, `task ${task.name}`),
      html("div", { class: "pair" },
        slider([html("span", {}, "mean ", ...sub("x̄", task.name))], { min: -3, max: 3, step: 0.1, value: task.mean, words: (v) => number(v, 1) },
          (v) => { task.mean = v; update(); }).node,
        slider([html("span", {}, "number ", ...sub("n", task.name))], { min: 0, max: data.most, value: task.n, words: (v) => String(v) },
          (v) => { task.n = v; update(); }).node)));
    update(null, false);
    return [
      html("div", { class: "tasks" }, ...sliders), html("div", { class: "buttons" }, next, back, swap), message,
      key([{ colour: "grey", dash: "dotted" }, "before"], [{ colour: "orange", dash: "dashed" }, "the task alone"],
        [EXACT, "belief"], [{ colour: "black", dash: "dashdot" }, "all at once"]),
      html("div", { class: "panels" }, densities.node, bars.node), readout.node, report.node,
    ];
  }

  function permutations(items) {
    if (items.length < 2) return [items];
    return items.flatMap((item) => permutations(items.filter((other) => other !== item)).map((rest) => [item, ...rest]));
  }

  const FIGURES = { strength, coin, mean };

  for (const script of document.querySelectorAll("script.ewc-play-data")) {
    const figure = script.closest("figure"), picture = figure.querySelector(".ewc-picture");
    const parts = FIGURES[script.dataset.kind](JSON.parse(script.textContent));
    picture.before(html("div", { class: "ewc-play", role: "group", "aria-label": "Figure with controls" }, ...parts));
    figure.classList.add("ewc-plays");
  }
})();
