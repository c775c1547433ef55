"""The published experiments on masks, each runnable by name: `python -m compress.experiments.<nim|gradual|at_init|weight_level>`.

`settings` reads a configuration (a JSON file that holds only what differs from the defaults), `base` prepares networks and keeps finished
runs, `training` prunes during training, `plots` draws figures with the CSV behind each.
"""
