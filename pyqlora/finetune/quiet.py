"""Silence around a run: transformers' progress bars and notes would break into ours."""


def quiet() -> None:
    """Keep transformers to errors, without progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
