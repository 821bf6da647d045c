#!lua flags=allow-oom
-- keep_key: write what is known of an API key, and tell the history. Also when memory is full: a key may have to be revoked
--   just then.
-- ARGV[1] name  ARGV[2] the key's digest  ARGV[3] the record as it was ('' none)  ARGV[4] the record (JSON)
-- ARGV[5] tenant  ARGV[6] rank  ARGV[7] what the history is told (JSON)
-- Returns: 'kept' | 'changed' (somebody was quicker).
-- Invariant: a name stands for one key for ever; what was revoked stays so.
check_type(KEY.api_keys, 'hash')
check_type(KEY.events, 'stream')
local name = KEY.api_key_name .. ARGV[1]
local known = call('HGET', KEY.api_keys, name)
local record = known and call('HGET', KEY.api_keys, known) or ''
if record ~= ARGV[3] or (known and known ~= ARGV[2]) then return 'changed' end
call('HSET', KEY.api_keys, name, ARGV[2], ARGV[2], ARGV[4])
call('XADD', KEY.events, '*', 'kind', 'key', 'id', ARGV[1], 'tenant', ARGV[5], 'rank', ARGV[6],
  'at_ms', digits(math.floor(clock_us() / 1000)), 'data', ARGV[7])
return 'kept'
