"""The side-by-side page: a small server and static files, nothing fetched from anywhere else."""
