"""Studies: rivals, null models, oracles and the tables of the papers."""
