"""Ray Serve as the host of `minga.inference`: models from the registry, swapped while they serve.

Ray Serve keeps replicas alive and routes requests; what a request is and how it is answered is
`minga.inference`'s alone. `host` starts and changes the deployment, `application` is what runs
in each replica, `watcher` follows a `ModelSource`, `registry_source` is that of MLflow, and
`service` joins them into `minga serve`.
"""
