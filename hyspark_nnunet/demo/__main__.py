"""``python -m hyspark_nnunet.demo``."""

import sys

from hyspark_nnunet.demo.run import main

sys.exit(main())
