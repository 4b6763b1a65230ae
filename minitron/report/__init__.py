"""The report at the end of a run: numbers, table, plots and one HTML page, read from the artefacts.

Entry points: `write.write_report`, `data.load_report`, `table.print_table`. The last two do not import torch, so a
finished run's table is there at once.
"""
