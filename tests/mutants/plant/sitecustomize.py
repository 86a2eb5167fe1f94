"""For a Python that tests start, by PYTHONPATH: it has the fault that they have."""

import plant

plant.by_environment()
