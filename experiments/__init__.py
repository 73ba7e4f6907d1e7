"""One script a paper result; `python -m experiments list` names them."""

import aigc_jax  # noqa: F401  first of all, for its handling of Ctrl-C
