"""What nnU-Net's trainer search imports: it loads every module of this folder, so there is one, and it is thin."""
