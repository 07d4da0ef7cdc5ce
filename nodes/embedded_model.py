"""The model that ships with the pack."""

from comfy_api.latest import io


class EmbeddedModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StylewrightEmbeddedModel",
            display_name="Embedded Model",
            category="stylewright/model",
            description=(
                "A small FLUX that ships with Stylewright: model, text encoder and VAE, with nothing to download. It "
                "draws simple subjects in named styles at 128x128, and everything that works on it works on FLUX.1-dev."
            ),
            search_aliases=["tiny flux", "demo model", "small model", "load checkpoint", "stylewright"],
            inputs=[
                io.Boolean.Input(
                    "one_step",
                    default=False,
                    optional=True,
                    tooltip="Put the student on it that was distilled from it: with a One-Step Sampler it draws in one "
                    "step, without CFG.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="A FLUX of a few million parameters. Sample it at CFG 3."),
                io.Clip.Output(
                    "clip",
                    tooltip="Its text encoder. It knows a few dozen words; any other is an error that lists them.",
                ),
                io.Vae.Output("vae", tooltip="Its autoencoder: 16 channels, 8 times smaller than the picture."),
            ],
        )

    @classmethod
    def execute(cls, one_step: bool = False) -> io.NodeOutput:
        from .bridge.embedded import load_embedded  # its parts: not at start-up

        embedded = load_embedded(one_step=one_step)
        return io.NodeOutput(embedded.model, embedded.clip, embedded.vae)
