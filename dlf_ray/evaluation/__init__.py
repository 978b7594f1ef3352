"""Methods side by side on benchmarks and own data: items in, rows of results and reports out.

`tasks` are what is asked, `evaluate` has it answered, `results` keeps the rows and sums them up,
`report` shows them, with the pictures of `plots`. Engines are given to it; nothing here starts one.
"""
