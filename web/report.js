// A run as elements: totals, a bar for every node with its steps, and memory over time. Texts go in as text, never HTML.
import { peak, seconds, size, steps, timed } from "./runs.js";

const SVG = "http://www.w3.org/2000/svg";
const STEPS_DRAWN = 200;
const WIDTH = 100;
const HEIGHT = 40;

/** An element with a class of ours, text, and children. */
export function element(tag, name, text = "", children = []) {
  const out = document.createElement(tag);
  if (name) out.className = name.replace(/\S+/g, "nibble-$&");
  if (text) out.textContent = text;
  out.append(...children);
  return out;
}

function shape(tag, attributes) {
  const out = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) out.setAttribute(name, String(value));
  return out;
}

/** The stylesheet beside this file, once. */
export function useStyle() {
  const href = new URL("./nibble.css", import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === href)) return;
  if (document.querySelector("link[data-nibble]")) return;
  const link = document.createElement("link");
  Object.assign(link, { rel: "stylesheet", href });
  link.dataset.nibble = "";
  document.head.append(link);
}

/** The whole report of `run`. */
export function report(run) {
  return element("div", "report", "", [totals(run), nodes(run), ...memory(run)]);
}

function totals(run) {
  const facts = [seconds(run.seconds), `peak ${size(peak(run))} of ${size(run.device.limit)}`, run.device.name];
  if (run.state !== "complete") facts.unshift(run.state);
  return element("div", "totals", "", [
    element("span", "label", run.label || "run"),
    ...facts.map((fact) => element("span", "fact", fact)),
  ]);
}

/** A row a node that ran, longest first; the others by name, a line a state. */
function nodes(run) {
  const idle = ["cached", "not run", "not timed"].map((state) => {
    const titles = run.nodes.filter((node) => node.state === state).map((node) => node.title);
    return titles.length ? [element("div", "fact", `${state}: ${titles.join(", ")}`)] : [];
  });
  return element("div", "nodes", "", [...timed(run).map((node) => row(node, run.seconds)), ...idle.flat()]);
}

function row(node, whole) {
  const share = whole > 0 ? Math.min(1, node.seconds / whole) : 0;
  const out = element("div", "row", "", [
    element("span", "title", node.title),
    bar(node, share),
    element("span", "seconds", seconds(node.seconds)),
    element("span", "steps", node.state === "stopped" ? "stopped" : steps(node)),
  ]);
  out.title = `${node.title}: ${seconds(node.seconds)}, ${Math.round(100 * share)} %`;
  return out;
}

/** A node's share of the run, divided where its steps end. */
function bar(node, share) {
  const fill = element("span", `fill ${node.kind}`);
  fill.style.width = `${(100 * share).toFixed(2)}%`;
  const total = node.steps.reduce((sum, t) => sum + t, 0);
  let at = Math.max(0, node.seconds - total); // steps come last: before them the node loads
  for (const t of node.steps.slice(0, Math.min(node.steps.length - 1, STEPS_DRAWN))) {
    at += t;
    const tick = element("span", "tick");
    tick.style.left = `${Math.min(100, (100 * at) / Math.max(node.seconds, 1e-9)).toFixed(2)}%`;
    fill.append(tick);
  }
  return element("span", "bar", "", [fill]);
}

/** Memory over time with the limit as a line; nothing where there is no curve. */
function memory(run) {
  if (run.curve.length < 2) return [];
  const top = 1.1 * Math.max(peak(run), 1);
  const near = run.device.limit > 0 && run.device.limit < 2 * top;
  const scale = near ? Math.max(top, 1.02 * run.device.limit) : top;
  const x = (t) => ((WIDTH * t) / Math.max(run.seconds, 1e-9)).toFixed(2);
  const y = (bytes) => (HEIGHT * (1 - bytes / scale)).toFixed(2);
  const points = run.curve.map((p) => `${x(p.t)},${y(p.device)}`);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "nibble-curve" });
  const ends = [`${x(run.curve[0].t)},${HEIGHT}`, `${x(run.curve.at(-1).t)},${HEIGHT}`];
  svg.append(shape("polygon", { points: [ends[0], ...points, ends[1]].join(" "), class: "nibble-area" }));
  const level = near ? run.device.limit : peak(run);
  const line = { x1: 0, x2: WIDTH, y1: y(level), y2: y(level), class: near ? "nibble-limit" : "nibble-peak" };
  svg.append(shape("line", line));
  const caption = near ? `memory; the line is the limit, ${size(level)}` : `memory; the line is the peak, ${size(level)}`;
  return [element("div", "memory", "", [svg, element("span", "fact", caption)])];
}
