// The front end's part of the pack: the last run on the profiler node, and the history of runs in the sidebar.
// Everything works without it; whatever fails here is reported once in the console and leaves ComfyUI alone.
import { app } from "../../scripts/app.js";
import { addRunWidget, showRun } from "./widget.js";
import { addHistory } from "./history.js";

const PROFILER = "NibbleProfiler";

/** Runs `work`; what it throws must not reach ComfyUI. */
function guarded(what, work) {
  try {
    return work();
  } catch (error) {
    console.warn(`Nibble: ${what} failed; the pack works without it.`, error);
  }
}

/** [node, the key of its outputs] of a graph and of the subgraphs in it. */
function* nodesIn(graph, prefix = "", depth = 0) {
  for (const node of graph?.nodes ?? []) {
    yield [node, prefix + node.id];
    if (node.subgraph && depth < 16) yield* nodesIn(node.subgraph, `${node.subgraph.id}:`, depth + 1);
  }
}

app.registerExtension({
  name: "Nibble.Profiling",

  nodeCreated(node) {
    if (node.comfyClass === PROFILER) guarded("the profiler's widget", () => addRunWidget(node));
  },

  // Outputs that come back: another tab's, or those of a run in the queue's history.
  onNodeOutputsUpdated(outputs) {
    guarded("the profiler's widget", () => {
      for (const [node, key] of nodesIn(app.rootGraph ?? app.graph)) {
        if (node.comfyClass === PROFILER) showRun(node, outputs?.[key]);
      }
    });
  },

  setup() {
    guarded("the history of runs", addHistory);
  },
});
