"""The demo: the whole line on a synthetic captioned world, and a report of what came out.

Every stage is one of the project's own tools in a process of its own, as a user would run it:

    plan.py     which commands, with how many images and iterations
    results.py  metrics and predictions -> a table over seeds
    figures.py  curves, captioned images
    masks.py    predicted masks beside the truth
    report.py   all of it in one HTML file
    main.py     the order of the above; `virtex_d2.studies.pipeline` runs the stages
"""
