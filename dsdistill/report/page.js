"use strict";
// Draws the charts whose points the page holds as JSON. Every text becomes a text node: no data is ever markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 260, LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 34, COLOURS = 8, SHOWN = 14, DOTS = 12;

function node(name, parent, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

function element(name, parent, kind, text = "") {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text;
  parent.append(made);
  return made;
}

function told(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(5)));
}

function ticks(low, high, log, most) {
  const found = [];
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((last - first) / most)), steps = last - first < 3 ? [1, 2, 5] : [1];
    for (let power = first; power <= last; power += every)
      for (const step of steps) found.push(step * 10 ** power);
  } else {
    const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= raw);
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  }
  return found.filter((value) => value >= low && value <= high);
}

function scale(values, log, from, to) {
  let low = Infinity, high = -Infinity;
  for (const value of values)
    if (!log || value > 0) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (low === Infinity) [low, high] = log ? [1, 10] : [0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const f = log ? Math.log10 : (value) => value, a = f(low), b = f(high);
  const at = (value) => from + ((f(value) - a) / (b - a)) * (to - from);
  return Object.assign(at, { low, high, log, back: (place) => a + ((place - from) / (to - from)) * (b - a) });
}

function* points(curve, log) {
  for (let i = 0; i < curve.xy.length; i += 2) {
    const y = curve.xy[i + 1];
    yield [curve.xy[i], y === null || (log && y <= 0) ? null : y, curve.sd ? curve.sd[i / 2] : 0];
  }
}

function axes(svg, chart, x, y, width) {
  for (const value of ticks(y.low, y.high, y.log, 5)) {
    node("line", svg, { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
    node("text", svg, { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, told(value));
  }
  for (const value of ticks(x.low, x.high, x.log, width < 420 ? 4 : 8)) {
    const anchor = x(value) > width - 30 ? "end" : "middle"; // a number at the edge stays whole
    node("text", svg, { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": anchor }, told(value));
  }
  node("text", svg, { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, chart.x);
}

function draw(chart, plot, hidden, log) {
  const width = Math.max(240, plot.clientWidth), curves = chart.curves.filter((curve) => !hidden.has(curve));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", chart.title);
  const all = chart.curves.flatMap((curve) => [...points(curve, false)]);
  const seen = curves.flatMap((curve) => [...points(curve, log)]).filter((point) => point[1] !== null);
  const x = scale(all.map((point) => point[0]), chart.xlog, LEFT, width - RIGHT);
  const y = scale(seen.flatMap(([, value, sd]) => [value - sd, value + sd]), log, HEIGHT - BOTTOM, TOP);
  axes(svg, chart, x, y, width);
  const marks = DATA.marks.filter((mark) => chart.x === "step" && (mark.kind === "stage" || chart.marked));
  for (const mark of marks.filter((mark) => mark.x >= x.low && mark.x <= x.high)) {
    const place = { class: `mark ${mark.kind}`, x1: x(mark.x), x2: x(mark.x), y1: TOP, y2: HEIGHT - BOTTOM };
    node("title", node("line", svg, place), {}, mark.text);
  }
  for (const curve of curves) {
    const group = node("g", svg, { class: curve.kind });
    const dots = chart.sparse || curve.xy.length <= 2 * DOTS, kept = [...points(curve, log)];
    kept.forEach(([at, value, sd], i) => {
      if (value === null) return;
      const alone = (kept[i - 1]?.[1] ?? null) === null && (kept[i + 1]?.[1] ?? null) === null;
      if (dots || alone) node("circle", group, { class: "dot", cx: x(at), cy: y(value), r: 2.5 });
      const low = log && value <= sd ? y.low : value - sd;
      if (sd) node("line", group, { class: "deviation", x1: x(at), x2: x(at), y1: y(low), y2: y(value + sd) });
    });
    const raw = curve.mean ? " raw" : "", d = line(curve.xy, x, y);
    node("path", group, { class: `curve ${curve.dash}${raw}`, d });
    if (curve.mean) node("path", group, { class: `curve ${curve.dash}`, d: line(curve.mean, x, y) });
  }
  const cursor = node("line", svg, { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
  const values = element("div", plot, "values");
  values.hidden = true;
  svg.addEventListener("pointermove", (event) => hover(event, svg, x, curves, cursor, values, chart));
  svg.addEventListener("pointerdown", (event) => hover(event, svg, x, curves, cursor, values, chart));
  svg.addEventListener("pointerleave", () => {
    values.hidden = true;
    cursor.style.visibility = "hidden";
  });
  plot.replaceChildren(svg, values);
}

function line(xy, x, y) {
  let path = "", open = false;
  for (let i = 0; i < xy.length; i += 2) {
    const value = xy[i + 1], there = value !== null && (!y.log || value > 0);
    if (there) path += `${open ? "L" : "M"}${x(xy[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    open = there;
  }
  return path;
}

function nearest(curve, at, f) {
  let best = null;
  for (const [x, y, sd] of points(curve, false))
    if (y !== null && (best === null || Math.abs(f(x) - at) < Math.abs(f(best[0]) - at))) best = [x, y, sd];
  return best;
}

function hover(event, svg, x, curves, cursor, values, chart) {
  const box = svg.getBoundingClientRect(), pointer = event.clientX - box.left, at = x.back(pointer);
  const f = x.log ? Math.log10 : (value) => value;
  const found = curves.map((curve) => [curve, nearest(curve, at, f)]).filter((pair) => pair[1] !== null);
  if (!found.length) return;
  const close = found.reduce((a, b) => (Math.abs(f(b[1][0]) - at) < Math.abs(f(a[1][0]) - at) ? b : a))[1][0];
  values.replaceChildren();
  element("div", values, "", `${chart.x} ${told(close)}`);
  const near = Math.abs(x(close) - pointer) + 24;
  const here = found.filter(([, point]) => Math.abs(x(point[0]) - pointer) <= near);
  for (const [curve, [px, py, sd]] of here.slice(0, SHOWN)) {
    const apart = px === close ? "" : ` (${told(px)})`;
    element("div", values, curve.kind, `${curve.name} ${told(py)}${sd ? ` ± ${told(sd)}` : ""}${apart}`);
  }
  if (here.length > SHOWN) element("div", values, "", `and ${here.length - SHOWN} more`);
  for (const attribute of ["x1", "x2"]) cursor.setAttribute(attribute, x(close));
  cursor.style.visibility = "visible";
  values.hidden = false;
  const right = x(close) > box.width / 2;
  values.style.left = right ? "auto" : `${x(close) + 12}px`;
  values.style.right = right ? `${box.width - x(close) + 12}px` : "auto";
}

function start(name, chart) {
  const figure = document.getElementById(name), plot = figure.querySelector(".plot"), hidden = new Set();
  const box = figure.querySelector("input"), legend = figure.querySelector(".legend");
  chart.curves.forEach((curve, i) => {
    const place = chart.colour + i;
    curve.kind = `c${place % COLOURS}`;
    curve.dash = `d${Math.floor(place / COLOURS) % 3}`;
  });
  const again = () => draw(chart, plot, hidden, box.checked);
  if (chart.curves.length > 1 || chart.marked)
    for (const curve of chart.curves) {
      const button = element("button", legend, curve.kind, curve.name);
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!hidden.delete(curve)) hidden.add(curve);
        button.setAttribute("aria-pressed", String(!hidden.has(curve)));
        again();
      });
    }
  box.checked = chart.log;
  box.addEventListener("change", again);
  again();
  let before = plot.clientWidth;
  new ResizeObserver(() => {
    if (plot.clientWidth !== before) again();
    before = plot.clientWidth;
  }).observe(plot);
  figure.dataset.drawn = "yes";
}

for (const [name, chart] of Object.entries(DATA.charts)) start(name, chart);
