"use strict";
// Draws the report of lora-build from the JSON beside it. Text only ever becomes text nodes: names are not ours.
const report = JSON.parse(document.getElementById("report").textContent);
const missing = "–";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children.filter((child) => child != null));
  return node;
}
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
function shown(value) {
  if (value == null) return missing;
  if (!isNumber(value)) return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
}
const percent = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)}%` : missing);
const short = (hash) => (hash == null ? missing : hash.replace(/^[a-z0-9]+:/, "").slice(0, 12));
const section = (title, ...children) => make("section", {}, make("h2", {}, title), ...children);

// -------------------------------------------------------------------------------------------------------- charts
const drawn = []; // [holder, draw(width)]: drawn again when the page's width changes
function chart(caption, draw, label = caption) {
  const holder = make("div", { class: "scroll", tabindex: "0", role: "img", "aria-label": label });
  drawn.push([holder, draw]);
  return make("figure", {}, make("figcaption", {}, caption), holder);
}
function redraw() {
  for (const [holder, draw] of drawn) {
    const width = holder.clientWidth;
    if (!width || holder.dataset.width === String(width)) continue;
    holder.dataset.width = width;
    holder.replaceChildren(draw(width));
  }
}
const base = (width, more) => Plot.plot({ width, style: { fontSize: "11px", background: "none" }, ...more });
// marks are read on both backgrounds; a cell's text is dark or light by what it stands on
const accent = "#3d84e0", second = "#e0862e", quiet = "#8b95a1";
const onCell = (color) => (d3.lab(color).l > 62 ? "#111" : "#fff");

function cells(data, width, { x, y, value, format, scheme, domain, rows, columns, label, down = null }) {
  const left = Math.min(0.45 * width, 16 + 6.4 * d3.max(rows, (row) => String(row).length));
  const cellWidth = Math.max(columns.length > 12 ? 14 : 34, (width - left - 10) / columns.length);
  const color = d3.scaleSequential(domain, scheme).clamp(true);
  const filled = data.filter((one) => isNumber(value(one)));
  const fits = cellWidth >= 34;
  return base(left + cellWidth * columns.length + 10, {
    height: (down ? 67 : 50) + 22 * rows.length, marginLeft: left, marginBottom: 40, marginTop: down ? 22 : 5, marginRight: 10,
    x: { domain: columns, label: x.label, tickSize: 0, ticks: columns.filter((_, place) => fits || place % 5 === 0) },
    y: { domain: rows, label: down, labelAnchor: "top", labelArrow: false, tickSize: 0 },
    marks: [
      Plot.cell(filled, { x: x.of, y: y.of, fill: (one) => color(value(one)), inset: 0.5 }),
      Plot.tip(filled, Plot.pointer({
        x: x.of, y: y.of, fill: "var(--page)", stroke: "var(--line)",
        title: (one) => `${y.of(one)}, ${x.label} ${x.of(one)}\n${label} ${format(value(one))}`,
      })),
      fits ? Plot.text(filled, { x: x.of, y: y.of, text: (one) => format(value(one)), fill: (one) => onCell(color(value(one))) }) : null,
    ],
  });
}

// ------------------------------------------------------------------------------------------------------ the table
function table(points) {
  const columns = [
    { name: "#", of: (point) => point.number },
    ...report.axes.map((axis) => ({ name: axis, of: (point) => point.axes[axis] })),
    ...report.metrics.map((metric) => ({ name: metric, of: (point) => point.scores[metric], numeric: true })),
    { name: "state", of: (point) => point.state },
    { name: "seconds", of: (point) => point.seconds, numeric: true },
    { name: "manifest", of: (point) => short(point.manifest_hash), link: (point) => point.manifest, code: true },
    ...(points.some((point) => point.error) ? [{ name: "error", of: (point) => point.error, why: true }] : []),
  ];
  if (!report.is_sweep) columns[0] = { name: "build", of: (point) => point.label };
  for (const column of columns) column.numeric ??= points.every((p) => column.of(p) == null || isNumber(column.of(p)));
  const body = make("tbody");
  const rows = points.map((point) => {
    const cellsOf = columns.map((column) => {
      const value = column.of(point);
      let inside = shown(value);
      if (column.code) inside = make("code", { title: point.manifest_hash }, inside);
      if (column.link?.(point)) inside = make("a", { href: column.link(point) }, inside);
      const kind = column.numeric ? "number" : column.why ? "why" : null;
      return make("td", { class: kind, "data-column": column.name, "data-value": value ?? "" }, inside);
    });
    const kind = point.error ? "failed" : point.number === report.best ? "best" : null;
    return [point, make("tr", { class: kind, "data-point": point.number }, ...cellsOf)];
  });
  const headers = columns.map((column) => {
    const button = make("button", { type: "button" }, column.name);
    const header = make("th", { scope: "col", class: column.numeric ? "number" : null, "aria-sort": "none" }, button);
    button.addEventListener("click", () => sort(column, header, header.getAttribute("aria-sort") === "ascending" ? -1 : 1));
    return header;
  });
  function sort(column, header, sign) {
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = ([point]) => column.of(point);
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x == null || y == null) return (x == null) - (y == null); // what is not known is last, either way
      return sign * (isNumber(x) && isNumber(y) ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
    });
    body.append(...rows.map(([, row]) => row));
  }
  body.append(...rows.map(([, row]) => row));
  const search = make("input", { type: "search", id: "filter", placeholder: "filter: math=0.5, failed, 3f2a", autocomplete: "off" });
  const count = make("span", { class: "soft", role: "status" });
  function filter() {
    const words = search.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    let left = 0;
    for (const [point, row] of rows) {
      const text = columns.map((column) => `${column.name}=${shown(column.of(point))}`).join("\n").toLowerCase();
      row.hidden = !words.every((word) => (word.includes("=") ? text.split("\n").some((one) => one.endsWith(word)) : text.includes(word)));
      left += !row.hidden;
    }
    count.textContent = left === rows.length ? `${rows.length} rows` : `${left} of ${rows.length} rows`;
  }
  search.addEventListener("input", filter);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement?.tagName !== "INPUT") { event.preventDefault(); search.focus(); }
    if (event.key === "Escape" && document.activeElement === search) { search.value = ""; filter(); }
  });
  filter();
  return make("div", {},
    make("div", { class: "tools" }, make("label", { for: "filter" }, "Filter "), search, count),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "all rows" },
      make("table", { class: "points" }, make("thead", {}, make("tr", {}, ...headers)), body)));
}

// ------------------------------------------------------------------------------------------ scores against the axes
const scored = report.points.filter((point) => report.metrics.some((metric) => isNumber(point.scores[metric])));
const valuesOf = (axis) => [...new Set(scored.map((point) => point.axes[axis]))];
const isNumeric = (axis) => valuesOf(axis).every(isNumber);
const inOrder = (axis) => (isNumeric(axis) ? valuesOf(axis).sort(d3.ascending) : valuesOf(axis).map(shown));
const tipOf = (point) =>
  [`#${point.number}`, ...report.axes.map((axis) => `${axis} ${shown(point.axes[axis])}`), ...report.metrics.map((m) => `${m} ${shown(point.scores[m])}`)].join("\n");

function againstAxis(metric, axis) {
  const data = scored.filter((point) => isNumber(point.scores[metric]));
  const x = isNumeric(axis) ? (point) => point.axes[axis] : (point) => shown(point.axes[axis]);
  const byX = d3.sort(d3.rollups(data, (group) => d3.mean(group, (point) => point.scores[metric]), x), ([at]) => at);
  return chart(`by ${axis}: a dot for each point, grey their mean`, (width) =>
    base(width, {
      height: 240, marginLeft: 52, marginBottom: 42,
      x: { label: axis, type: isNumeric(axis) ? "linear" : "point", ...(isNumeric(axis) ? { nice: true } : { domain: inOrder(axis) }) },
      y: { label: metric, grid: true, nice: true },
      marks: [
        isNumeric(axis) ? Plot.line(byX, { x: "0", y: "1", stroke: quiet }) : Plot.tickY(byX, { x: "0", y: "1", stroke: quiet }),
        Plot.dot(data, { x, y: (point) => point.scores[metric], fill: (point) => (point.number === report.best ? second : accent), r: (point) => (point.number === report.best ? 6 : 4) }),
        Plot.tip(data, Plot.pointer({ x, y: (point) => point.scores[metric], title: tipOf, fill: "var(--page)", stroke: "var(--line)" })),
      ],
    }));
}

function heatMap(metric, [across, down]) {
  const data = scored.filter((point) => isNumber(point.scores[metric]));
  const mean = d3.flatRollup(data, (group) => d3.mean(group, (p) => p.scores[metric]), (p) => p.axes[across], (p) => p.axes[down]);
  const domain = d3.extent(mean, ([, , value]) => value);
  const lower = report.lower_is_better.includes(metric);
  const rows = isNumeric(down) ? inOrder(down).reverse().map(shown) : inOrder(down);
  return chart(`by ${across} and ${down}${report.axes.length > 2 ? ": the mean" : ""}`, (width) =>
    cells(mean, width, {
      x: { of: ([at]) => shown(at), label: across }, y: { of: ([, at]) => shown(at) }, value: ([, , value]) => value,
      format: (value) => shown(Number(value.toPrecision(3))), scheme: lower ? (t) => d3.interpolateViridis(1 - t) : d3.interpolateViridis,
      domain: domain[0] === domain[1] ? [domain[0], domain[0] + 1] : domain, rows, down,
      columns: inOrder(across).map(shown), label: metric,
    }), `${metric}: rows are ${down}, columns ${across}`);
}

function parallel(metric) {
  const names = [...report.axes, metric];
  const data = scored.filter((point) => isNumber(point.scores[metric]));
  const value = (point, name) => (name === metric ? point.scores[metric] : point.axes[name]);
  const scales = new Map(names.map((name) => {
    const all = data.map((point) => value(point, name));
    if (all.every(isNumber)) { const [low, high] = d3.extent(all); return [name, (v) => (high === low ? 0.5 : (v - low) / (high - low))]; }
    const kinds = [...new Set(all.map(shown))];
    return [name, (v) => (kinds.length === 1 ? 0.5 : kinds.indexOf(shown(v)) / (kinds.length - 1))];
  }));
  const steps = data.flatMap((point) => names.map((name) => ({ point, name, at: scales.get(name)(value(point, name)), value: value(point, name) })));
  const ticks = names.flatMap((name) => [...new Map(steps.filter((s) => s.name === name).map((s) => [shown(s.value), s])).values()]);
  const few = names.flatMap((name) => { const own = ticks.filter((tick) => tick.name === name); return own.length <= 8 ? own : [d3.least(own, (o) => o.at), d3.greatest(own, (o) => o.at)]; });
  return chart(`Every point across its axes, coloured by ${metric}`, (width) =>
    base(Math.max(width, 130 * names.length), {
      height: 280, marginLeft: 70, marginRight: 90, marginBottom: 30,
      x: { domain: names, type: "point", label: null }, y: { axis: null },
      color: { type: "linear", scheme: "viridis", legend: true, label: metric },
      marks: [
        Plot.ruleX(names, { stroke: "var(--line)" }),
        Plot.line(steps, { x: "name", y: "at", z: (step) => step.point.number, stroke: (step) => step.point.scores[metric], strokeOpacity: 0.8, strokeWidth: (step) => (step.point.number === report.best ? 3 : 1.2) }),
        Plot.text(few, { x: "name", y: "at", text: (tick) => shown(tick.value), dx: 5, textAnchor: "start", fill: "var(--ink)", stroke: "var(--page)", strokeWidth: 3 }),
      ],
    }));
}

function pareto([first, other]) {
  const lower = (metric) => report.lower_is_better.includes(metric);
  const data = scored.filter((p) => isNumber(p.scores[first]) && isNumber(p.scores[other]));
  const front = data.filter((p) => report.front.includes(p.number)).sort((a, b) => d3.ascending(a.scores[first], b.scores[first]));
  const better = (metric) => `${metric} (${lower(metric) ? "lower" : "higher"} is better)`;
  return chart(`Pareto front: no point is better in both of ${first} and ${other} than those on the line`, (width) =>
    base(width, {
      height: 300, marginLeft: 52, marginBottom: 42, grid: true, x: { label: better(first), nice: true }, y: { label: better(other), nice: true },
      marks: [
        Plot.line(front, { x: (p) => p.scores[first], y: (p) => p.scores[other], stroke: second, strokeWidth: 1.5 }),
        Plot.dot(data, { x: (p) => p.scores[first], y: (p) => p.scores[other], fill: (p) => (report.front.includes(p.number) ? second : accent), r: (p) => (p.number === report.best ? 6 : 4) }),
        Plot.text(front, { x: (p) => p.scores[first], y: (p) => p.scores[other], text: (p) => `#${p.number}`, dy: -10, fill: "var(--ink)", stroke: "var(--page)", strokeWidth: 3 }),
        Plot.tip(data, Plot.pointer({ x: (p) => p.scores[first], y: (p) => p.scores[other], title: tipOf, fill: "var(--page)", stroke: "var(--line)" })),
      ],
    }));
}

// ------------------------------------------------------------------------------------------------- what a build is
function ofBuild(build) {
  const layers = [...new Set(build.cells.map((cell) => cell.layer))];
  const rows = [...new Set(build.cells.map((cell) => cell.module))];
  const picture = (title, key, format, domain, scheme) =>
    chart(`${title}: dark ${format(domain[0])}, bright ${format(domain[1])}`, (width) =>
      cells(build.cells, width, {
        x: { of: (cell) => shown(cell.layer), label: "layer" }, y: { of: (cell) => cell.module }, value: (cell) => cell[key],
        format, scheme, domain, rows, columns: layers.map(shown), label: title,
      }), `${title}: rows are module types, columns layers`);
  const largest = d3.max(build.cells, (cell) => cell.relative_norm) || 1;
  const adapters = make("table", { class: "adapters" },
    make("thead", {}, make("tr", {}, ...["adapter", "tensors", "‖ΔW‖/‖W‖", "elements changed by it"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...build.adapters.map((one) =>
      make("tr", {}, make("td", {}, one.adapter), make("td", { class: "number" }, shown(one.num_tensors)),
        make("td", { class: "number", "data-value": one.relative_norm ?? "" }, isNumber(one.relative_norm) ? one.relative_norm.toPrecision(3) : missing),
        make("td", { class: "number", "data-value": one.changed }, percent(one.changed))))));
  const title = make("h3", {}, build.label, " ", make("code", { class: "soft", title: build.manifest_hash }, short(build.manifest_hash)));
  const pictures = build.cells.length
    ? [picture("‖ΔW‖/‖W‖", "relative_norm", (v) => v.toPrecision(2), [0, largest], d3.interpolateViridis),
       picture("Part of the updated elements that rounding left changed", "changed", (v) => `${Math.round(100 * v)}%`, [0, 1], d3.interpolateViridis)]
    : [make("p", { class: "soft" }, "No survival report lies beside this build.")];
  return make("div", { class: "build" }, title, build.adapters.length ? make("div", { class: "scroll" }, adapters) : null, make("div", { class: "charts" }, ...pictures));
}

function ofPairs(found) {
  const sign = (value) => (isNumber(value) ? value.toFixed(3).replace(/^-(0\.0+)$/, "$1") : missing);
  const rows = found.pairs.map((pair) =>
    make("tr", {}, make("td", {}, `${pair.first} and ${pair.second}`), make("td", { class: "number", "data-value": pair.cosine ?? "" }, sign(pair.cosine)),
      make("td", { class: "number", "data-value": pair.opposed ?? "" }, percent(pair.opposed)), make("td", { class: "number" }, shown(pair.num_tensors))));
  const names = ["adapters", "cosine of ΔW", "opposite signs", "tensors in common"];
  const pairs = found.pairs.filter((pair) => pair.modules.length);
  const data = pairs.flatMap((pair) => pair.modules.map((one) => ({ ...one, pair: `${pair.first} and ${pair.second}` })));
  const picture = (title, key, format, domain, scheme) => chart(title, (width) =>
    cells(data, width, {
      x: { of: (one) => one.pair, label: "adapters" }, y: { of: (one) => one.module }, value: (one) => one[key], format, scheme, domain,
      rows: [...new Set(data.map((one) => one.module))], columns: [...new Set(data.map((one) => one.pair))], label: title,
    }));
  return make("div", {},
    make("div", { class: "scroll" }, make("table", { class: "pairs" }, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows))),
    data.length ? make("div", { class: "charts" },
      picture("Cosine of ΔW by module type", "cosine", sign, [-1, 1], (t) => d3.interpolatePuOr(1 - t)),
      picture("Elements of opposite signs by module type", "opposed", percent, [0, 1], d3.interpolateViridis)) : null);
}

function ofDrops(drops) {
  const rows = drops.map((drop) =>
    make("tr", {}, make("td", {}, drop.adapter), make("td", {}, drop.metric), make("td", { class: "number" }, shown(drop.with)),
      make("td", { class: "number" }, shown(drop.without)), make("td", { class: "number", "data-value": drop.effect }, (drop.effect > 0 ? "+" : "") + shown(drop.effect)),
      make("td", {}, `#${drop.point} and #${drop.other}`)));
  const names = ["adapter", "score", "with it", "without it", "its effect", "points"];
  return make("div", { class: "scroll" }, make("table", { class: "drops" }, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows)));
}

// ------------------------------------------------------------------------------------------------------- the page
function page() {
  const best = report.points.find((point) => point.number === report.best);
  const failed = report.points.filter((point) => point.error).length;
  const fact = (value, name) => make("li", {}, make("b", {}, value), name);
  const facts = [fact(String(report.points.length), report.is_sweep ? "points" : "builds"), failed ? fact(String(failed), "failed") : null];
  if (report.objective) facts.push(fact(best && isNumber(best.objective) ? shown(best.objective) : missing, `best: ${report.objective}`));
  if (best) facts.push(fact(`#${best.number}`, report.axes.map((axis) => `${axis} ${shown(best.axes[axis])}`).join(", ") || "the best"));
  const parts = [make("h1", {}, report.title), make("ul", { class: "facts" }, ...facts), section(report.is_sweep ? "Points" : "Builds", table(report.points))];
  const axes = report.axes.filter((axis) => valuesOf(axis).length > 1);
  const ofMetric = (metric) => [
    make("h3", {}, metric),
    make("div", { class: "charts" }, ...(axes.length === 2 ? [heatMap(metric, axes)] : []), ...(axes.length > 2 ? [parallel(metric)] : []), ...axes.map((axis) => againstAxis(metric, axis))),
  ];
  const scores = axes.length ? report.metrics.flatMap(ofMetric) : [];
  if (report.pareto.length) scores.unshift(make("div", { class: "charts" }, pareto(report.pareto)));
  if (scored.length > 1 && scores.length) parts.push(section("Scores", ...scores));
  if (report.drops.length) parts.push(section("What each adapter brings", make("p", { class: "soft" }, report.about_drops), ofDrops(report.drops)));
  if (report.interference?.pairs.length) parts.push(section("Interference between adapters", make("p", { class: "soft" }, report.interference.about), ofPairs(report.interference)));
  if (report.builds.length) parts.push(section("What the updates are, and what rounding left of them", ...report.builds.map(ofBuild)));
  if (report.notes.length) parts.push(section("Notes", make("ul", { class: "notes" }, ...report.notes.map((note) => make("li", {}, note)))));
  parts.push(make("footer", { class: "soft" }, `lora-build ${report.version}. Charts by Observable Plot and D3. Nothing on this page asks a network.`));
  document.querySelector("main").replaceChildren(...parts.filter((part) => part != null));
  redraw();
  new ResizeObserver(redraw).observe(document.body);
}
page();
