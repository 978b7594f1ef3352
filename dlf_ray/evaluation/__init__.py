"""Methods side by side on benchmarks and own data: items in, rows of results and reports out.

`tasks` are what is asked, `dialogue` how it is put, an `experiment` says by which methods,
`answering` has an engine answer, `evaluate` runs it all, resumably. `results` keeps the rows,
`provenance` says where they come from, `statistics` what they amount to. `report` writes pages:
`page` is what they show, `tables`, `plots` and `answers` are their parts. Engines are given to it;
nothing here starts one.
"""
