"""One script a paper result; `python -m experiments list` names them."""
