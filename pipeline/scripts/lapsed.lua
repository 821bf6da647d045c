#!lua flags=no-writes
-- lapsed: which consumers of a stage have no lease?
-- KEYS[1..3] the stage's streams   ARGV[1] group
-- Returns: time (us), then pairs: stream number, consumer.
local answer = {digits(clock_us())}
for number = 1, 3 do
  for _, row in ipairs(call('XINFO', 'CONSUMERS', KEYS[number], ARGV[1])) do
    local name = field_of(row, 'name')
    if call('EXISTS', KEY.worker .. name) == 0 then
      answer[#answer + 1] = number
      answer[#answer + 1] = name
    end
  end
end
return answer
