#!lua flags=allow-oom
-- forget: drop a replica that nobody registers any more, unless jobs still hold a lease on it.
-- ARGV[1] URL
-- Returns: 'forgotten' | 'leased'.
-- Invariant: llm:load equals the live leases at every moment, also while it goes.
if call('ZCARD', KEY.leases .. ARGV[1]) > 0 then return 'leased' end
call('HDEL', KEY.replicas, ARGV[1])
call('DEL', KEY.load .. ARGV[1], KEY.health .. ARGV[1])
return 'forgotten'
