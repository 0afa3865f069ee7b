// The sidebar's history of runs: what output/nibble holds, newest first; a click opens a run.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { element, report, useStyle } from "./report.js";
import { savedRun, savedRuns, seconds, size } from "./runs.js";

const TAB = "nibble-runs";
const EMPTY = "No runs yet. Put Profile this Run (Nibble) at the end of a workflow and run it.";

export function addHistory() {
  useStyle();
  let list = null; // the tab's element while it is open
  const fresh = () => list?.isConnected && fill(list);
  api.addEventListener("execution_success", fresh);
  api.addEventListener("execution_error", fresh);
  api.addEventListener("execution_interrupted", fresh);
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-stopwatch",
    title: "Nibble",
    tooltip: "Nibble: saved runs",
    type: "custom",
    render(place) {
      if (list && place.contains(list)) return; // the front end renders again on every change around it
      list = element("div", "list");
      place.replaceChildren(panel(list));
      fill(list);
    },
    destroy() {
      list = null;
    },
  });
}

function panel(list) {
  const again = element("button", "again", "Refresh");
  again.type = "button";
  again.addEventListener("click", () => fill(list));
  const head = element("div", "head", "", [element("span", "heading", "Runs"), again]);
  return element("div", "panel", "", [head, list]);
}

async function fill(list) {
  try {
    const runs = await savedRuns();
    const opened = new Set([...list.querySelectorAll("details[open]")].map((run) => run.dataset.name));
    list.replaceChildren(...(runs.length ? runs.map((row) => entry(row, opened)) : [element("p", "fact", EMPTY)]));
  } catch (error) {
    list.replaceChildren(element("p", "fact", `The list could not be read: ${error.message}`));
  }
}

/** A run's line; it stays open over a refresh if it is one of `opened`. */
function entry(row, opened) {
  const out = element("details", "run");
  out.dataset.name = row.name;
  const when = new Date(1000 * row.saved).toLocaleString();
  const name = row.name.replace(/_?\.json$/, "");
  const facts = row.error ? [row.error] : [when, seconds(row.seconds), `peak ${size(row.peak)}`, `${row.ran} nodes ran`];
  if (row.state && row.state !== "complete") facts.unshift(row.state);
  const line = facts.map((fact) => element("span", "fact", fact));
  out.append(element("summary", "summary", "", [element("span", "label", row.label || name), ...line]));
  if (!row.error) out.addEventListener("toggle", () => open(out, row.name), { once: true });
  out.open = opened.has(row.name);
  return out;
}

async function open(place, name) {
  try {
    place.append(report(await savedRun(name)), element("p", "fact", `output/nibble/${name}`));
  } catch (error) {
    place.append(element("p", "fact", `It could not be read: ${error.message}`));
  }
}
