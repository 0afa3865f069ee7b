"""Where the time and the memory went, whether a task will fit, and one run against another."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import estimate, model_profile, profiling, records, reports


class NibbleProfiler(io.ComfyNode):
    """Reports the whole prompt it stands in: every node, its steps and its memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleProfiler",
            display_name="Profile this Run (Nibble)",
            category="Nibble/profiling",
            description="Measures the run it stands in: seconds of every node, sampling steps, memory over time. "
            "Connect anything to it; it waits for the other nodes and comes last. The report is saved under "
            "output/nibble.",
            search_aliases=["profiler", "time", "how long", "speed", "vram", "memory", "benchmark", "slow", "timer"],
            inputs=[
                io.AnyType.Input("anything", tooltip="Any output of the run, for example the picture. It is not used."),
                io.String.Input(
                    "label", default="", tooltip="What to call this run in tables and comparisons, for example 4-bit."
                ),
                io.String.Input(
                    "filename_prefix",
                    default=profiling.PREFIX,
                    advanced=True,
                    tooltip="Name of the saved report under output/. A number is added; no file is ever overwritten.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="Tables in markdown, for Preview as Text."),
                io.String.Output("json", display_name="JSON", tooltip="The same for programs, as it is saved."),
                io.Image.Output(
                    "chart", display_name="chart", tooltip="When each node ran, its steps, and the memory."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, label="", filename_prefix=profiling.PREFIX, anything=None):
        # Called after the prompt's registry is made, before its first node; inputs that are linked are not known yet.
        profiling.ensure(label, filename_prefix)
        return float("nan")  # a report of a run is never an old one

    @classmethod
    async def execute(cls, anything, label, filename_prefix) -> io.NodeOutput:
        run, files = await profiling.report(cls.hidden.unique_id, label, filename_prefix)
        return io.NodeOutput(*reports.outputs(run), ui=reports.ui(run, files))


class NibbleProfileModel(io.ComfyNode):
    """A MODEL that measures its own model evaluations."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleProfileModel",
            display_name="Profile this Model (Nibble)",
            category="Nibble/profiling",
            description="Passes the model on with a stopwatch in it: every model evaluation is measured by itself, the "
            "first apart from the rest, and loading apart from both. Profile this Run shows it; without one the run "
            "is saved all the same.",
            search_aliases=["steps", "it/s", "seconds per step", "warm up", "benchmark model", "sampling speed"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure. It samples exactly as before."),
                io.String.Input("label", default="", tooltip="Its name in tables; empty: how its weights are stored."),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The same model; connect it to a sampler.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, label="", model=None):
        profiling.ensure()  # so that the nodes before the sampler are timed, too
        return label

    @classmethod
    def execute(cls, model, label) -> io.NodeOutput:
        return io.NodeOutput(model_profile.recording(model, label))


class NibbleEstimate(io.ComfyNode):
    """Memory and seconds of a task before it is run."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleEstimate",
            display_name="Will it Fit? (Nibble)",
            category="Nibble/profiling",
            description="Estimates memory by part and seconds of a task before it is run, and says which cards it fits "
            "in 16, 8 and 4 bits. Weights are exact; the rest is fitted on measured runs, and says so where it is not.",
            search_aliases=["vram", "memory", "fit", "estimate", "how much", "gpu", "requirements", "oom"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=estimate.choices(),
                    tooltip="The model's file; only its header is read. Choose 'none' to connect a model instead.",
                ),
                io.Int.Input("width", default=1024, min=16, max=16384, step=8, tooltip="Picture width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=8, tooltip="Picture height in pixels."),
                io.Int.Input("batch", default=1, min=1, max=4096, tooltip="Pictures made at once."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Model evaluations; most samplers take one "
                             "a step."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Above 1 every step runs the "
                               "prompt and the negative prompt together: twice the activations and the time."),
                io.Combo.Input("precision", options=estimate.precision_choices(), tooltip="How the weights are stored. "
                               "'as stored' takes the file or model as it is."),
                io.Int.Input("rank", default=32, min=0, max=256, step=16, advanced=True,
                             tooltip="Rank of the 16-bit branch beside svdquant 4-bit weights."),
                io.Int.Input("lora_rank", default=0, min=0, max=1024, tooltip="Rank of a LoRA beside 4-bit weights; 0 "
                             "for none. On 16-bit weights a LoRA is merged and takes nothing."),
                io.Combo.Input("gpu", options=estimate.gpu_choices(), tooltip="The card to ask about, or this "
                "machine."),
                io.Model.Input("model", optional=True, tooltip="A loaded model, instead of a file."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, to count it."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE, to count it and the decoding."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The answer, its parts, the formula with its "
                                 "numbers, and the table of cards; markdown."),
                io.String.Output("json", display_name="JSON", tooltip="The same numbers for programs."),
                io.Image.Output("chart", display_name="chart", tooltip="Memory by part for every precision."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file=records.NONE, **_):
        return estimate.fingerprint(file)

    @classmethod
    def execute(cls, file, gpu, model=None, clip=None, vae=None, **task) -> io.NodeOutput:
        report, json, chart = estimate.run(estimate.Task(**task), gpu, estimate.Models(file, model, clip, vae))
        return io.NodeOutput(report, json, chart, ui={"text": [report]})


class NibbleCompareProfiles(io.ComfyNode):
    """Saved runs side by side."""

    @classmethod
    def define_schema(cls):
        saved = records.choices()
        more = [records.NONE, *saved]
        each = "Another saved run to compare with the first."
        return io.Schema(
            node_id="NibbleCompareProfiles",
            display_name="Compare Runs (Nibble)",
            category="Nibble/profiling",
            description="Puts saved runs of Profile this Run side by side: seconds by kind of work, seconds of a model "
            "evaluation, memory, and each run's ratio to the first. Press R to see new runs in the lists.",
            search_aliases=["compare", "ratio", "faster", "speedup", "before after", "benchmark", "profiles"],
            inputs=[
                io.Combo.Input(
                    "first", options=saved, default=records.BEFORE, tooltip="The saved run that counts as 1."
                ),
                io.Combo.Input("second", options=saved, default=records.NEWEST, tooltip=each),
                io.Combo.Input("third", options=more, default=records.NONE, tooltip=each),
                io.Combo.Input("fourth", options=more, default=records.NONE, tooltip=each),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="Markdown: every number and its ratio."),
                io.String.Output("csv", display_name="CSV", tooltip="The same for a spreadsheet."),
                io.Image.Output("chart", display_name="chart", tooltip="Seconds by kind of work and the memory peaks."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **chosen):
        return records.fingerprint(list(chosen.values()))

    @classmethod
    def execute(cls, first, second, third, fourth) -> io.NodeOutput:
        table, csv, chart = reports.compared([first, second, third, fourth])
        return io.NodeOutput(table, csv, chart, ui={"text": [table]})


NODES = [NibbleProfiler, NibbleProfileModel, NibbleEstimate, NibbleCompareProfiles]
