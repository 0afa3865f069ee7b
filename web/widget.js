// The last run on the profiler node: a DOM widget, which both renderers show.
import { element, report, useStyle } from "./report.js";
import { savedRun, timed } from "./runs.js";

const NAME = "nibble_run";
const FOLDER = "nibble";
const ROW = 22;
const MOST = 12; // rows; more are scrolled to
const BASE = 160; // totals, what did not run, memory and margins
const WIDTH = 400;
const EMPTY = "Run the workflow to see where the time went.";
const shown = new WeakMap(); // node -> { element, height, file }

/** Puts the widget on a new node and shows every run of it. */
export function addRunWidget(node) {
  useStyle();
  const state = { element: element("div", "widget", EMPTY), height: 60, file: "" };
  shown.set(node, state);
  const options = { serialize: false, hideOnZoom: true, getMinHeight: () => state.height };
  const widget = node.addDOMWidget(NAME, "nibble_run", state.element, options);
  widget.serialize = false;
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    showRun(node, output);
  };
}

/** Shows the run of a node's `output`; a node without one keeps what it shows. */
export function showRun(node, output) {
  const state = shown.get(node);
  const run = output?.nibble_run?.[0];
  const file = run?.file?.filename ?? "";
  if (!state || !run || (file && file === state.file)) return;
  state.file = file;
  complete(run)
    .then((full) => state.file === file && draw(node, state, full)) // else a newer run came meanwhile
    .catch((error) => console.warn("Nibble: the run could not be drawn.", error));
}

function draw(node, state, run) {
  state.element.replaceChildren(report(run));
  state.height = BASE + ROW * Math.min(timed(run).length, MOST);
  node.setSize([Math.max(node.size[0], WIDTH), Math.max(node.size[1], node.computeSize()[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

/** The saved run where it can be read, else what came with the output: the rows, without steps and memory's curve. */
async function complete(run) {
  if (run.file?.subfolder === FOLDER) {
    try {
      return await savedRun(run.file.filename);
    } catch {
      // Renamed or deleted since: the rows below still say what they say.
    }
  }
  const nodes = run.rows.map((row) => ({ ...row, steps: [], peaks: { host: run.peak } }));
  const device = { name: "", kind: "cpu", limit: run.peak };
  return { label: run.label, state: "complete", seconds: run.seconds, device, nodes, curve: [] };
}
