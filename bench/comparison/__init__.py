"""`python -m bench`: every method at equal measured speed, and LayerCache's own parts one by one.

`scenario` says what is run, `field` who takes part, `tuning` chooses settings on validation
prompts, `measuring` times and compares them on held-out ones, `store` lets a killed run continue,
`equal_speed` reads curves at a speed, and `results`, `goals`, `tables`,
`pictures` and `page` write them down.
"""
