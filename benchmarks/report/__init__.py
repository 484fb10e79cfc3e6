"""Reports of a sweep, made from its result files alone: tables, plots and one page with heat maps."""
