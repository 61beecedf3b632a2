"""VirTex-D2: from captioned images to a detectron2 detector.

Importing this package makes detectron2 usable on the installed torch, numpy, Pillow and setuptools
(see `virtex_d2.engine.compat`) and says how to install detectron2 where it is absent. It imports
neither torch nor detectron2, so that it costs nothing; import it before detectron2.
"""

from virtex_d2.engine import compat

__version__ = "0.1.0"

compat.apply()
