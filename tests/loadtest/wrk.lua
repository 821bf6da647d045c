-- The request of the load tester, for wrk: the two can then be compared against the same server.
wrk.method = "POST"
wrk.body = '{"query": "How many legs does a spider have?"}'
wrk.headers["content-type"] = "application/json"
wrk.headers["accept"] = "application/json"
