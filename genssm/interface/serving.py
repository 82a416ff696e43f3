"""How the page starts: what takes longest begins first."""

from __future__ import annotations

from collections.abc import Sequence

from genssm.interface.house import House


def serve(models: Sequence[str] = (), *, port: int | None = None, share: bool = False) -> None:
    """Build and serve the page. ``models`` take the place of the shipped ones of their modality.

    Raises CheckpointError for a model that cannot be loaded, OSError for a port that is taken.
    """
    house = House(models)
    house.warm_up()  # compiles on a second core while Gradio is imported on the first

    from genssm.interface.page import build_page, launch

    try:
        launch(build_page(house), port=port, share=share)
    except OSError as error:
        if port is None or "empty port" not in str(error):
            raise
        raise OSError(f"the port {port} is taken; give another one") from error
