"""beartype as the type checkers read it: where `float` is asked for, an int will do (PEP 484's numeric tower)."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
