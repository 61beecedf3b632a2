"""Learn to restore images: enlarged, without noise, without rain.

network, tasks, origin, files          the network by released names; what a file says it is
degrade, samples, loss, method         training: clean crops, degraded on the device
tiles, photo, sets, scores, pictures   images of any size, restored in tiles and compared
restore, main                          the tool
"""
