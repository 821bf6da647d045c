#!lua
-- input: keep what was asked for a person, for a while; not for one who was erased meanwhile.
-- ARGV[1] person (as it stands in keys)  ARGV[2] their epoch, when they were looked up  ARGV[3] inputs (JSON)
-- ARGV[4] for how long (ms)
-- Returns: 'kept' | 'forgotten'.
-- Invariant: nothing of a person is kept that was read before they were erased.
if call('HGET', KEY.user .. ARGV[1], 'epoch') ~= ARGV[2] then return 'forgotten' end
call('SET', KEY.input .. ARGV[1], ARGV[3], 'PX', ARGV[4])
return 'kept'
