// Saved runs from the server, and how their numbers are written. The same words as profiling/tables.py.
import { api } from "../../scripts/api.js";

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const MAX_ROWS = 200;

/** Asks one of the pack's routes. Throws Error with the server's own sentence. */
async function ask(path) {
  const reply = await api.fetchApi(path);
  const data = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(data.error ?? `the server answered ${reply.status}`);
  return data;
}

/** One row a saved run, newest first. */
export const savedRuns = async () => (await ask("/nibble/runs")).runs;

/** A saved run by its file's name. */
export const savedRun = (name) => ask(`/nibble/runs/${encodeURIComponent(name)}`);

/** 512 B, 1.5 MiB, 3.25 GiB */
export function size(bytes) {
  if (bytes >= GIB) return `${(bytes / GIB).toFixed(2)} GiB`;
  return bytes >= MIB / 10 ? `${(bytes / MIB).toFixed(1)} MiB` : `${Math.round(bytes)} B`;
}

/** 0.34 ms, 56.7 ms, 1.23 s, 83 s */
export function seconds(t) {
  if (t < 1) return t < 0.01 ? `${(1000 * t).toFixed(2)} ms` : `${(1000 * t).toFixed(1)} ms`;
  return t < 60 ? `${t.toFixed(2)} s` : `${Math.round(t)} s`;
}

/** The nodes that ran, longest first. */
export function timed(run) {
  const ran = run.nodes.filter((node) => node.state === "ran" || node.state === "stopped");
  return ran.sort((a, b) => b.seconds - a.seconds).slice(0, MAX_ROWS);
}

/** "4 x 0.12 s", with "~" where the steps were read from the progress bar. */
export function steps(node) {
  if (!node.steps.length) return "";
  const mean = node.steps.reduce((sum, t) => sum + t, 0) / node.steps.length;
  return `${node.steps.length} x ${node.exact ? "" : "~"}${seconds(mean)}`;
}

/** The most memory in use at any time: sampled, and every node's own peak. As profiling/report.py has it. */
export function peak(run) {
  const { nodes, curve, device } = run;
  const own = (p) => (device.kind === "cpu" ? p.host : p.process || p.reserved || p.allocated);
  return Math.max(0, ...nodes.map((node) => own(node.peaks)), ...curve.map((point) => point.device));
}
