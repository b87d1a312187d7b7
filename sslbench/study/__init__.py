"""The comparison itself: rows x budgets x seeds, then evaluations, from one file by one executor.

spec.py is the file, budget.py what a budget makes of a recipe, cells.py what there is to run and what the ledger has of
it, grid.py all cells of a study, executor.py what runs them, rank.py the tests and the words, record.py what is kept
beside the results. printed.py and tables.py are the papers' tables, as printed and as studies.
"""
