"""What every run stands on. Imports nothing else of the project.

errors, files, images, config, cli     bad input; files, whole or not at all; YAML; flags
listening, signals, stopping,          a run is asked to stop: noted, agreed upon by all
    unfinished                             processes, ended with a checkpoint and exit code 75
topology, distributed, preflight,      who is who, processes started and met, do they fit
    parent, workers                        together; children and loader workers that end in time
run, lock, identity, device,           folder, log, seed; one run a folder; what a resumed run
    randomness, scaling                    may not change; precision; random numbers by place
trainer, loop, hooks, checkpointer     updates, what happens between them, what is kept
safe_load, unpickling, bounded,        anybody's checkpoint, read without its code; the one
    backbone_file, frozen                  file between the packages; networks that stay
compat                                 detectron2's versions and today's torch, numpy, Pillow
"""
