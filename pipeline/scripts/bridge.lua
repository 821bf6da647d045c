#!lua
-- bridge: put a request for a report, which came from another broker, on the stream, where there is room for it.
-- ARGV[1] the request  ARGV[2] where its response is wanted (see bridge.py)  ARGV[3] entries at most
-- Returns: 'added' | 'full' (it stays where it came from).
if call('XLEN', KEY.report_requests) >= tonumber(ARGV[3]) then return 'full' end
call('XADD', KEY.report_requests, '*', 'data', ARGV[1], 'reply', ARGV[2])
return 'added'
